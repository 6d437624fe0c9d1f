"""How x_t is made from x_0, and where its randomness comes from: the pair, not the batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .methods import Inversion


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
    """

    flip: bool
    drop_prompt: bool
    timestep: int
    noise: Tensor
    latent_noise: Tensor
    inversion_noise: Tensor | None = None


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
        stream: "pair", or another word for what is shown beside the pair.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, stream, epoch, index))
    coins = torch.rand(2, generator=generator)
    timestep = int(torch.randint(0, num_train_timesteps, (1,), generator=generator))
    noise = torch.randn(tuple(shape), generator=generator)
    latent_noise = torch.randn(tuple(shape), generator=generator)
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
    )


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
