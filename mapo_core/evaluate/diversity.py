"""Diversity: how much pictures of one prompt differ between seeds, with the LoRA and without."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .statistics import Interval, mean_interval

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Diversity:
    """Mean cosine distance between pictures of one prompt, 0-2.

    Attributes:
        base, lora: without and with the LoRA.
        difference: lora - base, prompt by prompt; below 0 the LoRA makes pictures more alike.
        prompts: how many.
        seeds: pictures per prompt.
        embedder: what measures the distance.
    """

    base: Interval
    lora: Interval
    difference: Interval
    prompts: int
    seeds: int
    embedder: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def diversity_of(base: Tensor, lora: Tensor, seeds: int, embedder: str, seed: int = 0) -> Diversity:
    """Compare embeddings.

    Args:
        base, lora: unit vectors [N * seeds, D], the seeds of a prompt after one another.
        seeds: pictures per prompt, at least 2.
        embedder: noted in the result.
        seed: of the bootstrap.
    """
    before, after = _spread(base, seeds), _spread(lora, seeds)
    change = [a - b for a, b in zip(after, before, strict=True)]
    intervals = [mean_interval(values, seed=seed) for values in (before, after, change)]
    return Diversity(*intervals, prompts=len(before), seeds=seeds, embedder=embedder)


def _spread(vectors: Tensor, seeds: int) -> list[float]:
    """Per prompt: mean of 1 - cosine over its pairs of pictures, [N]."""
    x = vectors.view(-1, seeds, vectors.shape[1])  # [N, seeds, D]
    likeness = x @ x.transpose(1, 2)  # [N, seeds, seeds]
    off_diagonal = likeness.sum(dim=(1, 2)) - likeness.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (1 - off_diagonal / (seeds * seeds - seeds)).tolist()
