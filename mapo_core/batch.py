"""One batch of pairs of the same size: from the cache and the pair's own randomness to squared errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .adapter import adapter_off
from .noising import PairRandomness, add_noise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .cache import EncodedPairs
    from .families.base import DiffusionModel, Family


@dataclass(frozen=True)
class PairBatch:
    """B pairs on the device; the first B rows are the chosen images, the next B (if any) the rejected ones.

    Attributes:
        noisy: x_t, [B or 2B, 4, h, w] float32.
        target: what the denoiser should predict, like `noisy`.
        timesteps: [B or 2B], the same for both images of a pair.
        conditions: as `Family.batch_conditions` gives them.
        weights: of the pairs, [B].
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    conditions: dict[str, Tensor]
    weights: Tensor

    @property
    def paired(self) -> bool:
        """Whether rejected images are in it."""
        return len(self.noisy) == 2 * len(self.weights)


def assemble(
    pairs: EncodedPairs,
    indices: Sequence[int],
    randomness: Sequence[PairRandomness],
    model: DiffusionModel,
    family: Family,
    *,
    paired: bool,
) -> PairBatch:
    """Read B pairs from the cache, sample their latents and add their noise."""
    entries = [pairs.entries[i] for i in indices]
    images = [e.chosen for e in entries] + ([e.rejected for e in entries] if paired else [])
    prompts = [e.prompt for e in entries] + ([e.rejected_prompt for e in entries] if paired else [])
    draws = [*randomness, *randomness] if paired else list(randomness)
    latents = torch.stack([pairs.latents(i, r.latent_noise, r.flip) for i, r in zip(images, draws, strict=True)])
    noise = torch.stack([r.noise for r in draws])
    timesteps = torch.tensor([r.timestep for r in draws])
    noisy, target = add_noise(model.noise_scheduler, latents, noise, timesteps)
    embeds = [pairs.prompt("" if r.drop_prompt else p) for p, r in zip(prompts, draws, strict=True)]
    conditions = family.batch_conditions(embeds, [i.geometry for i in images])
    device = model.device
    return PairBatch(
        noisy=_move(noisy, device),
        target=_move(target, device),
        timesteps=_move(timesteps, device),
        conditions={name: _move(t, device) for name, t in conditions.items()},
        weights=_move(torch.tensor([e.weight for e in entries]), device),
    )


def pair_errors(model: DiffusionModel, family: Family, batch: PairBatch, needs: frozenset[str]) -> dict[str, Tensor]:
    """The squared errors that a method needs, each [B] float32: mean over channels, height and width."""
    errors: dict[str, Tensor] = {}
    if needs & {"chosen_mse_ref", "rejected_mse_ref"}:
        with torch.no_grad(), adapter_off(model.unet):
            errors |= _named(_squared_error(model, family, batch), batch, "_ref")
    errors |= _named(_squared_error(model, family, batch), batch, "")
    return {name: errors[name] for name in needs}


def _squared_error(model: DiffusionModel, family: Family, batch: PairBatch) -> Tensor:
    model_pred = family.predict(model, batch.noisy, batch.timesteps, batch.conditions)
    return (model_pred.float() - batch.target).pow(2).mean(dim=(1, 2, 3))  # [B or 2B]


def _named(errors: Tensor, batch: PairBatch, suffix: str) -> dict[str, Tensor]:
    if not batch.paired:
        return {f"chosen_mse{suffix}": errors}
    chosen, rejected = errors.chunk(2)
    return {f"chosen_mse{suffix}": chosen, f"rejected_mse{suffix}": rejected}


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
