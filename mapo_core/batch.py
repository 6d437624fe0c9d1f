"""One batch of pairs of the same size: from the cache and the pair's own randomness to squared errors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from .adapter import adapter_is_off, adapter_off
from .noising import PairRandomness, add_noise

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from .cache import EncodedPairs, PairEntry
    from .families.base import DiffusionModel, Family, ImageGeometry

Rows = slice | torch.Tensor
Reference = Literal["prompt", "base_prompt"]

ALL = slice(None)
REFERENCES: Mapping[str, Reference] = {"_ref": "prompt", "_base": "base_prompt"}  # suffix of what a method needs


@dataclass(frozen=True)
class PairBatch:
    """B pairs on the device; the first B rows are the chosen images, the next B (if any) the rejected ones.

    Attributes:
        noisy: x_t, [B or 2B, 4, h, w] float32.
        target: what the denoiser should predict, like `noisy`.
        timesteps: [B or 2B], the same for both images of a pair.
        conditions: as `Family.batch_conditions` gives them.
        weights: of the pairs, [B].
        latents: x_0, like `noisy`.
        levels: `timesteps` as numbers on the CPU.
        inversion_noise: fresh noise of an inversion's steps, [B or 2B, steps, 4, h, w]; None where there is none.
        base_conditions: as `conditions`, with the pairs' base prompts; the same object where they have none.
        prompts, geometry: what the rows' conditions are made of, where the text encoders are trained.
        mask: how much each place of an image counts, [B or 2B, 1, h, w] in 0-1; None where all count alike.
        scores: `chosen_score` and `rejected_score`, [B] each in 0-1; empty where the pairs have none.
    """

    noisy: Tensor
    target: Tensor
    timesteps: Tensor
    conditions: dict[str, Tensor]
    weights: Tensor
    latents: Tensor
    levels: list[int]
    inversion_noise: Tensor | None
    base_conditions: dict[str, Tensor]
    scores: dict[str, Tensor]
    prompts: list[str]
    geometry: list[ImageGeometry]
    mask: Tensor | None = None

    @property
    def chosen_rows(self) -> slice:
        """The rows of the chosen images."""
        return slice(0, len(self.weights))

    @property
    def rejected_rows(self) -> slice:
        """The rows of the rejected images."""
        return slice(len(self.weights), None)

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
    entries = [
        swapped(pairs.entries[i]) if r.swap else pairs.entries[i] for i, r in zip(indices, randomness, strict=True)
    ]
    images = [e.chosen for e in entries] + ([e.rejected for e in entries] if paired else [])
    prompts = [e.prompt for e in entries] + ([e.rejected_prompt for e in entries] if paired else [])
    draws = [*randomness, *randomness] if paired else list(randomness)
    latents = torch.stack([pairs.latents(i, r.latent_noise, r.flip) for i, r in zip(images, draws, strict=True)])
    noise = torch.stack([r.noise for r in draws])
    timesteps = torch.tensor([r.timestep for r in draws])
    noisy, target = add_noise(model.noise_scheduler, latents, noise, timesteps)
    geometry = [i.geometry for i in images]

    def conditions_of(prompts: list[str]) -> dict[str, Tensor]:
        embeds = [pairs.prompt("" if r.drop_prompt else p) for p, r in zip(prompts, draws, strict=True)]
        return {n: _move(t, device) for n, t in family.batch_conditions(embeds, geometry).items()}

    device = model.device
    conditions = base_conditions = conditions_of(prompts)
    if any(e.base_prompt is not None for e in entries):
        own = [e.base_prompt for e in entries] * (2 if paired else 1)
        base_conditions = conditions_of([p if b is None else b for p, b in zip(prompts, own, strict=True)])
    masks = [pairs.mask(i, r.flip) for i, r in zip(images, draws, strict=True)]
    whole = torch.ones(1, *latents.shape[2:])
    mask = torch.stack([whole if m is None else m for m in masks]) if any(m is not None for m in masks) else None
    fresh = [r.inversion_noise for r in draws if r.inversion_noise is not None]
    scores = [e.scores for e in entries if e.scores is not None]
    return PairBatch(
        noisy=_move(noisy, device),
        target=_move(target, device),
        timesteps=_move(timesteps, device),
        conditions=conditions,
        weights=_move(torch.tensor([e.weight for e in entries]), device),
        latents=_move(latents, device),
        levels=[r.timestep for r in draws],
        mask=None if mask is None else _move(mask, device),
        inversion_noise=_move(torch.stack(fresh), device) if fresh else None,
        base_conditions=base_conditions,
        scores={
            name: _move(torch.tensor([pair[k] for pair in scores]), device)
            for k, name in enumerate(("chosen_score", "rejected_score"))
            if scores
        },
        prompts=["" if r.drop_prompt else p for p, r in zip(prompts, draws, strict=True)],
        geometry=geometry,
    )


def swapped(entry: PairEntry) -> PairEntry:
    """The pair with a wrong vote: images and prompts change places, scores and weight stay where they are."""
    return replace(
        entry,
        chosen=entry.rejected,
        rejected=entry.chosen,
        prompt=entry.rejected_prompt,
        rejected_prompt=entry.prompt,
    )


def pair_errors(model: DiffusionModel, family: Family, batch: PairBatch, needs: frozenset[str]) -> dict[str, Tensor]:
    """What a method needs of the pairs, in one forward pass for both images; as `fixed_errors` and `mean_squares`."""
    errors = fixed_errors(model, family, batch, needs)
    return errors | named_errors(mean_squares(batch, residuals(model, family, batch)), batch)


def fixed_errors(
    model: DiffusionModel, family: Family, batch: PairBatch, needs: frozenset[str], *, apart: bool = False
) -> dict[str, Tensor]:
    """What a method needs and training does not change: scores and errors of the reference, [B] float32 each.

    Args:
        model: with the adapter.
        family: of the model.
        batch: the pairs.
        needs: names as `methods.base.Loss` explains them.
        apart: chosen and rejected images in forward passes of their own.
    """
    errors: dict[str, Tensor] = {name: values for name, values in batch.scores.items() if name in needs}
    sides = [batch.chosen_rows, batch.rejected_rows] if apart and batch.paired else [ALL]
    for suffix, reference in REFERENCES.items():
        if any(name.endswith(suffix) for name in needs):
            found = [mean_squares(batch, residuals(model, family, batch, s, reference=reference), s) for s in sides]
            errors |= named_errors(torch.cat(found), batch, suffix)
    return {name: values for name, values in errors.items() if name in needs}


def named_errors(errors: Tensor, batch: PairBatch, suffix: str = "") -> dict[str, Tensor]:
    """The errors [B or 2B] of a batch under the names that methods know."""
    if not batch.paired:
        return {f"chosen_mse{suffix}": errors}
    chosen, rejected = errors.chunk(2)
    return {f"chosen_mse{suffix}": chosen, f"rejected_mse{suffix}": rejected}


def mean_squares(batch: PairBatch, residual: Tensor, rows: Rows = ALL) -> Tensor:
    """K of these rows, [R] float32: the mean over channels, height and width, with a mask m sum(m e^2) / sum(m).

    Args:
        batch: the pairs.
        residual: of `residuals`, [R, 4, h, w].
        rows: which rows they are.
    """
    if batch.mask is None:
        return residual.pow(2).mean(dim=(1, 2, 3))
    mask = batch.mask[rows]  # [R, 1, h, w]
    return (mask * residual.pow(2)).sum(dim=(1, 2, 3)) / (residual.shape[1] * mask.sum(dim=(1, 2, 3)))


def mean_squares_gradient(batch: PairBatch, residual: Tensor, rows: Rows = ALL) -> Tensor:
    """dK / d prediction, like `residual`; arguments as of `mean_squares`."""
    if batch.mask is None:
        return residual * (2 / residual[0].numel())
    mask = batch.mask[rows]
    return 2 * mask * residual / (residual.shape[1] * mask.sum(dim=(1, 2, 3), keepdim=True))


def residuals(
    model: DiffusionModel, family: Family, batch: PairBatch, rows: Rows = ALL, *, reference: Reference | None = None
) -> Tensor:
    """Prediction - target of these rows, [R, 4, h, w] float32; arguments as of `predict_rows`."""
    return predict_rows(model, family, batch, rows, reference=reference).float() - batch.target[rows]


def predict_rows(
    model: DiffusionModel,
    family: Family,
    batch: PairBatch,
    rows: Rows = ALL,
    *,
    reference: Reference | None = None,
    latents: Tensor | None = None,
    timesteps: Tensor | None = None,
) -> Tensor:
    """The denoiser's output for some rows of a batch, [R, 4, h, w]. Every forward pass of training goes through here.

    Args:
        model: with the adapter.
        family: of the model.
        batch: the pairs.
        rows: which of its rows; `batch.chosen_rows` and `batch.rejected_rows` are the images of one side.
        reference: None: the network that is trained. "prompt", "base_prompt": the same network without the adapter, on
            the pair's prompt or on its base prompt, without gradient.
        latents: noisy latents in place of the batch's own, [R, 4, h, w].
        timesteps: in place of the batch's own, [R].
    """
    noisy = batch.noisy[rows] if latents is None else latents
    times = batch.timesteps[rows] if timesteps is None else timesteps
    if reference is None:
        return family.predict(model, noisy, times, row_conditions(model, family, batch, rows))
    with torch.no_grad(), adapter_off(model.unet):
        return family.predict(model, noisy, times, row_conditions(model, family, batch, rows, reference=reference))


def row_conditions(
    model: DiffusionModel, family: Family, batch: PairBatch, rows: Rows, *, reference: Reference | None = None
) -> dict[str, Tensor]:
    """What the denoiser is told beside the latents of these rows; arguments as of `predict_rows`.

    Where the text encoders are trained, the prompts go through them here, with gradient; the cache has what they give
    without the adapter, which is the reference's.
    """
    if reference is None and model.trains_text and not adapter_is_off(model.unet):
        return _live_conditions(model, family, batch, torch.arange(len(batch.prompts))[_on_cpu(rows)].tolist())
    conditions = batch.base_conditions if reference == "base_prompt" else batch.conditions
    return {name: tensor[rows] for name, tensor in conditions.items()}


def _live_conditions(model: DiffusionModel, family: Family, batch: PairBatch, rows: list[int]) -> dict[str, Tensor]:
    """Every prompt once, however many rows have it."""
    for encoder in model.text_encoders:
        if encoder.training != model.unet.training:
            encoder.train(model.unet.training)
    texts = list(dict.fromkeys(batch.prompts[i] for i in rows))
    embeds = dict(zip(texts, family.encode_prompts_live(model, texts), strict=True))
    return family.batch_conditions([embeds[batch.prompts[i]] for i in rows], [batch.geometry[i] for i in rows])


def _on_cpu(rows: Rows) -> Rows:
    return rows if isinstance(rows, slice) else rows.cpu()


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
