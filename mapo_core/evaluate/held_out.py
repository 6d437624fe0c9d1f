"""Accuracy and margin on pairs that were kept from training, at fixed noise and timesteps."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from ..adapter import adapter_off
from ..batch import assemble, pair_errors
from ..noising import PairRandomness, seed_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..cache import EncodedPairs
    from ..families.base import DiffusionModel, Family

_NEEDS = frozenset({"chosen_mse", "rejected_mse"})


@dataclass(frozen=True)
class HeldOut:
    """What a network thinks of the held-out pairs, mean over pairs and draws.

    Attributes:
        accuracy: share of (pair, draw) whose chosen image is predicted with the smaller error, 0-1.
        margin: mean of K_l - K_w; larger means that the chosen images are more its own.
        chosen_mse, rejected_mse: mean K_w and K_l.
        pairs: how many pairs.
        draws: fixed timesteps per pair.
    """

    accuracy: float
    margin: float
    chosen_mse: float
    rejected_mse: float
    pairs: int
    draws: int

    def as_dict(self) -> dict[str, float | int]:
        """For an event."""
        return asdict(self)


@dataclass(frozen=True)
class HeldOutErrors:
    """The errors behind a `HeldOut`, one entry per (pair, draw).

    Attributes:
        pairs: place of the pair in its set.
        chosen, rejected: K_w and K_l.
        draws: fixed timesteps per pair.
        draw: which of them each entry is of.
    """

    pairs: list[int]
    chosen: list[float]
    rejected: list[float]
    draws: int
    draw: list[int]

    @property
    def correct(self) -> list[float]:
        """1 where the chosen image is predicted with the smaller error, else 0."""
        return [float(c < r) for c, r in zip(self.chosen, self.rejected, strict=True)]

    def summary(self) -> HeldOut:
        """The means."""
        n = len(self.pairs)
        chosen, rejected = sum(self.chosen) / n, sum(self.rejected) / n
        return HeldOut(sum(self.correct) / n, rejected - chosen, chosen, rejected, len(set(self.pairs)), self.draws)


def measure_held_out(
    model: DiffusionModel,
    family: Family,
    pairs: EncodedPairs,
    indices: Sequence[int],
    *,
    draws: int,
    seed: int,
    batch_size: int,
    base: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOut:
    """The means of `held_out_errors`."""
    return held_out_errors(
        model, family, pairs, indices, draws=draws, seed=seed, batch_size=batch_size, base=base, progress=progress
    ).summary()


@torch.no_grad()
def held_out_errors(
    model: DiffusionModel,
    family: Family,
    pairs: EncodedPairs,
    indices: Sequence[int],
    *,
    draws: int,
    seed: int,
    batch_size: int,
    base: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeldOutErrors:
    """Measure the pairs at `indices`; the same noise whenever it is called with the same seed.

    Args:
        model: with the adapter.
        family: of the model.
        pairs: the encoded set.
        indices: the held-out pairs, at least one.
        draws: timesteps per pair, spread evenly over the schedule.
        seed: of the run.
        batch_size: pairs per forward pass; no influence on the result.
        base: measure with the adapter switched off.
        progress: called with batches done and batches in all.
    """
    total = model.noise_scheduler.config.num_train_timesteps
    by_bucket: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for index in indices:
        by_bucket.setdefault(pairs.bucket(index), []).extend((index, draw) for draw in range(draws))
    chunks = [w[i : i + batch_size] for w in by_bucket.values() for i in range(0, len(w), batch_size)]
    was_training = model.unet.training
    model.unet.eval()
    collected: list[torch.Tensor] = []
    with adapter_off(model.unet) if base else nullcontext():
        for done, chunk in enumerate(chunks):
            randomness = [fixed_randomness(pairs, i, d, draws, total, seed) for i, d in chunk]
            batch = assemble(pairs, [i for i, _ in chunk], randomness, model, family, paired=True)
            errors = pair_errors(model, family, batch, _NEEDS)
            collected.append(torch.stack([errors["chosen_mse"], errors["rejected_mse"]]))
            progress(done + 1, len(chunks))
    model.unet.train(was_training)
    chosen, rejected = torch.cat(collected, dim=1).double().cpu().tolist()  # one wait for the device
    entries = [entry for chunk in chunks for entry in chunk]
    return HeldOutErrors([i for i, _ in entries], chosen, rejected, draws, [d for _, d in entries])


def fixed_randomness(pairs: EncodedPairs, index: int, draw: int, draws: int, total: int, seed: int) -> PairRandomness:
    """Draw `draw` of a pair: a timestep in the middle of its share of the schedule, and noise that never changes."""
    generator = torch.Generator().manual_seed(seed_of(seed, "held_out", index, draw))
    shape = pairs.latent_shape(index)
    return PairRandomness(
        flip=False,
        drop_prompt=False,
        timestep=int((draw + 0.5) / draws * total),
        noise=torch.randn(shape, generator=generator),
        latent_noise=torch.randn(shape, generator=generator),
    )
