"""Bootstrap intervals: how far a mean would move with other prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def resample_counts(groups: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often each of `groups` is drawn with replacement, [resamples, groups]; each row sums to `groups`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples)


def mean_interval(values: Sequence[float], groups: Sequence[Hashable] | None = None, seed: int = 0) -> Interval:
    """The mean of values and its interval; values of one group are drawn together.

    Args:
        values: at least one.
        groups: what each value belongs to, for example its prompt; None: each stands for itself.
        seed: of the resampling.
    """
    labels = list(range(len(values))) if groups is None else list(groups)
    names = {name: i for i, name in enumerate(dict.fromkeys(labels))}
    index = np.array([names[g] for g in labels])
    sums = np.bincount(index, weights=np.asarray(values, dtype=np.float64))
    sizes = np.bincount(index)
    counts = resample_counts(len(names), seed)
    means = (counts @ sums) / (counts @ sizes)
    return Interval(float(sums.sum() / sizes.sum()), *percentiles(means))


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
