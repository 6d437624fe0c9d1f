"""Files with the same picture, or nearly the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

NEAR = 0.1
"""Largest distance of the signatures of near duplicates: a tenth of the picture's own contrast."""

_BLOCK = 512  # rows of the distance matrix at a time


def looks_same(signatures: np.ndarray) -> bool:
    """Whether two images with these signatures [2, 193] are near duplicates."""
    return float(np.linalg.norm(signatures[0] - signatures[1])) <= NEAR


def equal_groups(values: np.ndarray) -> Iterator[np.ndarray]:
    """The places of equal values [N], in groups of at least two; the group that comes first is first."""
    _, first, inverse, counts = np.unique(values, return_index=True, return_inverse=True, return_counts=True)
    members = np.argsort(inverse.reshape(-1), kind="stable")
    ends = np.cumsum(counts)
    for group in np.argsort(first):
        if counts[group] > 1:
            yield members[ends[group] - counts[group] : ends[group]]


def near_groups(signatures: np.ndarray) -> Iterator[np.ndarray]:
    """The places of pictures that are nearly the same, in groups of at least two, by their signatures [N, 193].

    All distances are computed, as blocks of one matrix product: 10^5 images take half a minute of one core, far less
    than decoding them. Only the first near image before each one is kept, so that many alike cost no more.
    """
    if len(signatures) < 2:
        return
    leaders = _leaders(signatures)  # [N]
    for i in range(len(leaders)):
        leaders[i] = leaders[leaders[i]]  # leaders come before those they lead, so theirs are final
    yield from equal_groups(leaders)


def _leaders(signatures: np.ndarray) -> np.ndarray:
    """For each row the first earlier row within `NEAR`, else the row itself; [N]."""
    ones, halves = np.ones((len(signatures), 1), np.float32), (signatures**2).sum(axis=1, keepdims=True) / 2
    left = np.hstack([signatures, -halves, -ones])
    right = np.hstack([signatures, ones, halves])  # left[i] @ right[j] = -|s_i - s_j|^2 / 2
    leaders = np.empty(len(signatures), dtype=np.intp)
    for start in range(0, len(signatures), _BLOCK):
        stop = min(start + _BLOCK, len(signatures))
        near = left[start:stop] @ right[:stop].T >= -(NEAR**2) / 2  # [block, stop]
        near[:, start:] = np.tril(near[:, start:])  # no later rows
        leaders[start:stop] = near.argmax(axis=1)
    return leaders
