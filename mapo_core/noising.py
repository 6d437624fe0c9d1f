"""How x_t is made from x_0, and where its randomness comes from: the pair, not the batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .methods import Inversion
    from .sections import LossConfig


@dataclass(frozen=True)
class PairRandomness:
    """Everything random about one showing of a pair; both of its images share all of it.

    Attributes:
        flip: show both images mirrored.
        drop_prompt: train on the empty prompt.
        timestep: in [0, num_train_timesteps).
        noise: epsilon of the forward process, [4, h, w].
        latent_noise: which sample of the VAE's posterior is taken, [4, h, w].
        inversion_noise: what is added in each step of an inversion, [steps, 4, h, w]; None where nothing is.
        swap: the two images change places.
    """

    flip: bool
    drop_prompt: bool
    timestep: int
    noise: Tensor
    latent_noise: Tensor
    inversion_noise: Tensor | None = None
    swap: bool = False


def seed_of(*parts: object) -> int:
    """A 63-bit seed from numbers and words, the same on every machine."""
    digest = hashlib.blake2b("/".join(str(p) for p in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def draw_randomness(
    seed: int,
    epoch: int,
    index: int,
    shape: Sequence[int],
    *,
    num_train_timesteps: int,
    flip: bool = False,
    caption_dropout: float = 0.0,
    inversion: Inversion | None = None,
    settings: LossConfig | None = None,
    stream: str = "pair",
) -> PairRandomness:
    """The randomness of pair `index` in `epoch`; nothing else has an influence.

    Args:
        seed: seed of the run.
        epoch: how often the pair was shown before.
        index: place of the pair in its set.
        shape: of its latents, [4, h, w].
        num_train_timesteps: length of the noise schedule.
        flip: whether mirroring is allowed.
        caption_dropout: probability of the empty prompt.
        inversion: of the method, if it has one; the timestep is then one of its levels.
        settings: of noise levels, kinds of noise and label noise; None: uniform levels, Gaussian noise, no label noise.
        stream: "pair", or another word for what is shown beside the pair.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, stream, epoch, index))
    coins = torch.rand(2, generator=generator)
    timestep = int(torch.randint(0, num_train_timesteps, (1,), generator=generator))
    noise = torch.randn(tuple(shape), generator=generator)
    latent_noise = torch.randn(tuple(shape), generator=generator)
    swap = False
    if settings is not None:
        # Generators of their own, so that no setting changes what the others draw.
        streams = [torch.Generator().manual_seed(seed_of(seed, stream, epoch, index, w)) for w in ("level", "shape")]
        timestep = draw_timestep(streams[0], settings, num_train_timesteps, timestep)
        noise = shape_noise(
            noise,
            streams[1],
            offset=settings.noise_offset,
            levels=settings.multires_noise_levels,
            discount=settings.multires_noise_discount,
        )
        swap = seed_of(seed, "label noise", index) < settings.label_noise * 2**63
    inversion_noise = None
    if inversion is not None:
        timestep = inversion_levels(inversion.steps, num_train_timesteps)[
            timestep * inversion.steps // num_train_timesteps
        ]
        if inversion.eta > 0:
            inversion_noise = torch.randn((inversion.steps, *shape), generator=generator)
    return PairRandomness(
        flip=flip and bool(coins[0] < 0.5),
        drop_prompt=bool(coins[1] < caption_dropout),
        timestep=timestep,
        noise=noise,
        latent_noise=latent_noise,
        inversion_noise=inversion_noise,
        swap=swap,
    )


def draw_timestep(generator: torch.Generator, settings: LossConfig, num_train_timesteps: int, uniform: int) -> int:
    """A noise level as the settings want it; `uniform`, drawn from the whole schedule, where they want nothing else."""
    low, high = timestep_range(settings, num_train_timesteps)
    if settings.timestep_sampling == "logit_normal":
        x = settings.logit_mean + settings.logit_std * torch.randn((), generator=generator)
        share = float(torch.sigmoid(x))
    elif (low, high) == (0, num_train_timesteps - 1):
        return uniform
    else:
        share = float(torch.rand((), generator=generator))
    return low + min(int(share * (high - low + 1)), high - low)


def timestep_range(settings: LossConfig, num_train_timesteps: int) -> tuple[int, int]:
    """The smallest and the largest noise level that are trained.

    Raises:
        ConfigError: the model's schedule has fewer.
    """
    high = num_train_timesteps - 1 if settings.max_timestep is None else settings.max_timestep
    if high >= num_train_timesteps or settings.min_timestep > high:
        raise ConfigError(
            f"loss.min_timestep and loss.max_timestep must lie in 0 to {num_train_timesteps - 1} for this model."
        )
    return settings.min_timestep, high


def shape_noise(
    noise: Tensor, generator: torch.Generator, *, offset: float = 0.0, levels: int = 0, discount: float = 0.3
) -> Tensor:
    """Gaussian noise with more of low frequencies.

    Multi-resolution noise: level i is 2-4 times as coarse as the one before, enlarged to the full size and added with
    weight discount^i, until it is one cell; then everything is scaled back to standard deviation 1. Offset noise: one
    number per channel, times `offset`, on top.

    Args:
        noise: [4, h, w].
        generator: of the pair.
        offset: of the offset noise; 0: none.
        levels: of the multi-resolution noise; 0: none.
        discount: 0-1.
    """
    height, width = noise.shape[-2:]
    coarseness = 1.0
    for level in range(1, levels + 1):
        coarseness *= 2 + 2 * float(torch.rand((), generator=generator))
        size = (max(1, int(height / coarseness)), max(1, int(width / coarseness)))
        coarse = torch.randn((1, len(noise), *size), generator=generator)
        fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        noise = noise + discount**level * fine[0]
        if size == (1, 1):
            break
    if levels:
        noise = noise / noise.std()
    if offset:
        noise = noise + offset * torch.randn((len(noise), 1, 1), generator=generator)
    return noise


def snr_weights(alphas_cumprod: Tensor, timesteps: Tensor, kind: str, gamma: float, v_prediction: bool) -> Tensor:
    """Weight of the denoising error at each noise level, [B] float32.

    "min_snr" (Hang et al., arXiv 2303.09556) weighs the error of x_0 with min(snr, gamma), "debiased" (Yu et al., arXiv
    2310.08442) with sqrt(snr). The error of epsilon is snr times that of x_0, the error of v (snr + 1) times.

    Args:
        alphas_cumprod: of the noise schedule, [T].
        timesteps: [B].
        kind: "min_snr" or "debiased".
        gamma: of "min_snr".
        v_prediction: whether the network predicts v instead of epsilon.
    """
    alpha = alphas_cumprod.double()[timesteps]
    # Zero terminal SNR has 0 in it, for which epsilon tells nothing of x_0 and no weight is right: the bounds, which
    # only such schedules reach, keep it finite.
    snr = (alpha / (1 - alpha).clamp(min=1e-12)).clamp(min=0 if v_prediction else 1e-3, max=1e6)
    of_x0 = snr.clamp(max=gamma) if kind == "min_snr" else snr.sqrt()
    return (of_x0 / (snr + 1 if v_prediction else snr)).float()


def inversion_levels(steps: int, num_train_timesteps: int) -> list[int]:
    """The timesteps at the ends of an inversion's steps, evenly spaced: 99, 199, ..., 999 for 10 of 1000."""
    return [(k + 1) * num_train_timesteps // steps - 1 for k in range(steps)]


def add_noise(noise_scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Gaussian forward process: noisy latents and what the denoiser should predict, both like `latents`.

    Args:
        noise_scheduler: a diffusers scheduler with `prediction_type` "epsilon" or "v_prediction".
        latents: x_0, [B, 4, h, w].
        noise: epsilon, like `latents`.
        timesteps: [B], int64.
    """
    return noise_scheduler.add_noise(latents, noise, timesteps), target_of(noise_scheduler, latents, noise, timesteps)


def target_of(noise_scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the denoiser should predict; arguments as of `add_noise`."""
    if noise_scheduler.config.prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(latents, noise, timesteps)
    return noise
