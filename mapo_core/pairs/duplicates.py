"""Files with the same picture, or nearly the same."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .measure import ImageFacts

NEAR = 0.1
"""Largest distance of the signatures of near duplicates: a tenth of the picture's own contrast."""

_BLOCK = 512  # rows of the distance matrix at a time


def looks_same(a: ImageFacts, b: ImageFacts) -> bool:
    """Whether two images are near duplicates."""
    return float(np.linalg.norm(a.signature - b.signature)) <= NEAR


def exact_groups(paths: Sequence[Path], facts: dict[Path, ImageFacts]) -> list[list[Path]]:
    """Files with equal pixels, in groups of at least two."""
    groups: dict[bytes, list[Path]] = {}
    for path in paths:
        groups.setdefault(facts[path].pixels, []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def near_groups(paths: Sequence[Path], facts: dict[Path, ImageFacts]) -> list[list[Path]]:
    """Files whose pictures are nearly the same, in groups of at least two; of equal ones only the first is looked at.

    All distances are computed, as blocks of one matrix product: 10^5 images take half a minute of one core, far less
    than decoding them. Only the first near image before each one is kept, so that many alike cost no more.
    """
    first_of = {facts[path].pixels: path for path in reversed(paths)}
    different = [path for path in paths if first_of[facts[path].pixels] == path]
    if len(different) < 2:
        return []
    leaders = _leaders(np.stack([facts[path].signature for path in different]))  # [N]
    groups: dict[int, list[Path]] = {}
    for i, path in enumerate(different):
        leaders[i] = leaders[leaders[i]]  # leaders come before those they lead, so theirs are final
        groups.setdefault(int(leaders[i]), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


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
