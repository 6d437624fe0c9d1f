"""Drift: how far the LoRA's predictions are from the base model's on prompts outside the training set.

The base model's own pictures of those prompts are noised at fixed timesteps, and both networks predict. The distance is
a mean of squares per latent value, like K, so that it can be read beside the base model's own error there: a drift of
0.1 times that error is little, one that exceeds it means that unrelated prompts have changed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..adapter import adapter_off
from ..families.base import ImageGeometry
from ..noising import add_noise, seed_of
from .statistics import Interval, mean_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image
    from torch import Tensor

    from ..families.base import DiffusionModel, Family


@dataclass(frozen=True)
class Drift:
    """Distances, means over prompts and timesteps.

    Attributes:
        distance: mean squared difference of the two predictions.
        base_error: the base model's own squared error at the same places.
        relative: distance / base_error.
        prompts: how many.
        draws: fixed timesteps per prompt.
    """

    distance: Interval
    base_error: float
    relative: float
    prompts: int
    draws: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def measure_drift(
    model: DiffusionModel,
    family: Family,
    pictures: Sequence[Image.Image],
    embeds: Sequence[dict[str, Tensor]],
    base_embeds: Sequence[dict[str, Tensor]],
    *,
    draws: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Drift:
    """Compare the predictions of LoRA and base model.

    Args:
        model: with the adapter and its VAE.
        family: of the model.
        pictures: one per prompt, of one size, as the base model draws it.
        embeds: the encoded prompts, as `Family.encode_prompts` gives them.
        base_embeds: the same from the base model's text encoders.
        draws: timesteps per prompt, spread evenly over the schedule.
        seed: of the noise.
        progress: called with prompts done and prompts in all.
    """
    total = model.noise_scheduler.config.num_train_timesteps
    timesteps = torch.tensor([int((d + 0.5) / draws * total) for d in range(draws)])
    width, height = pictures[0].size
    geometry = ImageGeometry((height, width), (0, 0), (height, width))
    device = model.device
    assert model.vae is not None
    home = next(model.vae.parameters()).device
    model.vae.to(device)
    distances: list[float] = []
    errors: list[float] = []
    try:
        for i, (picture, embed, base_embed) in enumerate(zip(pictures, embeds, base_embeds, strict=True)):
            pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
            x0 = family.encode_images(model, pixels)[0].float().cpu().expand(draws, -1, -1, -1)  # [draws, 4, h, w]
            generator = torch.Generator().manual_seed(seed_of(seed, "drift", i))
            noise = torch.randn(x0.shape, generator=generator)
            noisy, target = add_noise(model.noise_scheduler, x0, noise, timesteps)
            arguments = (noisy.to(device), timesteps.to(device))

            def conditions(embed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
                found = family.batch_conditions([embed] * draws, [geometry] * draws)
                return {name: tensor.to(device) for name, tensor in found.items()}

            tuned = family.predict(model, *arguments, conditions(embed)).float().cpu()
            with adapter_off(model.unet):
                base = family.predict(model, *arguments, conditions(base_embed)).float().cpu()
            distances.append((tuned - base).pow(2).mean().item())
            errors.append((base - target).pow(2).mean().item())
            progress(i + 1, len(pictures))
    finally:
        model.vae.to(home)
    distance = mean_interval(distances, seed=seed)
    base_error = sum(errors) / len(errors)
    return Drift(distance, base_error, distance.value / base_error, len(pictures), draws)
