"""The held-out split of a set that is too large for its names to be in memory: the same as of a small one."""

from __future__ import annotations

import hashlib
import heapq
import json
import random
import tempfile
from array import array
from contextlib import ExitStack
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from .errors import PairsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import IO

    from .pairs import PreferencePair

_SORTED_AT_A_TIME = 50_000


def split_large(
    pairs: Sequence[PreferencePair], share: float, seed: int, at_most: int = 200
) -> tuple[Sequence[int], Sequence[int]]:
    """As `data_order.split_held_out` by chosen image, marks included, with some bytes of memory per pair.

    Raises:
        PairsError: every pair is marked as held out.
    """
    marks = np.fromiter((-1 if p.held_out is None else p.held_out for p in pairs), np.int8, len(pairs))
    count = len(pairs)
    held = np.zeros(count, bool)
    free = np.ones(count, bool)
    wanted = min(at_most, round(count * share))
    if (marks >= 0).any():
        groups = np.fromiter((_short_hash(str(p.chosen)) for p in pairs), np.uint64, count)
        out = np.isin(groups, groups[marks == 1])
        held = out & (marks != 0)
        if held.all():
            raise PairsError("Every pair is marked as held out, so none is left to train on. Take the mark off some.")
        free = ~out & ~np.isin(groups, groups[marks == 0])
        wanted -= int(held.sum())
    elif share > 0:
        wanted = max(1, wanted)
    if wanted > 0 and free.any():
        drawn = draw_groups(Names(pairs, free), wanted, seed)
        if not drawn.all() or held.any() or not free.all():
            held[np.flatnonzero(free)[drawn]] = True
    return array("i", np.flatnonzero(~held).tolist()), array("i", np.flatnonzero(held).tolist())


class Names:
    """The names of the chosen images of some pairs, as often as they are gone through."""

    def __init__(self, pairs: Iterable[PreferencePair], wanted: np.ndarray) -> None:
        self._pairs = pairs
        self._wanted = wanted

    def __iter__(self) -> Iterator[str]:
        return (str(p.chosen) for p, wanted in zip(self._pairs, self._wanted, strict=True) if wanted)


def draw_groups(names: Iterable[str], wanted: int, seed: int) -> np.ndarray:
    """Which pairs are held out, as `data_order.split_held_out` draws them.

    Args:
        names: of each pair's group; may be gone through several times.
        wanted: how many pairs to hold out.
        seed: of the run.

    Returns:
        bool [N].
    """
    hashes = np.fromiter(map(_short_hash, names), np.uint64)
    _, first, groups, sizes = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
    is_first = np.zeros(len(hashes), bool)
    is_first[first] = True
    firsts = groups[is_first]  # groups in the order in which they come
    ranked = _sorted_numbers(name for name, new in zip(names, is_first, strict=True) if new)
    order = array("i", range(len(first)))
    random.Random(f"{seed}/held_out").shuffle(order)
    chosen: list[int] = []
    taken = 0
    for place in order:
        if taken >= wanted:
            break
        group = int(firsts[ranked[place]])
        if taken + sizes[group] <= wanted or not chosen:
            chosen.append(group)
            taken += int(sizes[group])
    return np.isin(groups, chosen)


def _sorted_numbers(names: Iterator[str]) -> array[int]:
    """The places of names that are all different, sorted by name: parts are sorted in memory and merged from disk."""
    with ExitStack() as files:
        parts: list[IO[str]] = []
        count = 0
        while part := list(islice(names, _SORTED_AT_A_TIME)):
            file = files.enter_context(tempfile.TemporaryFile("w+", encoding="ascii"))
            numbered = sorted((name, count + i) for i, name in enumerate(part))
            file.writelines(f"{json.dumps(entry)}\n" for entry in numbered)
            file.seek(0)
            parts.append(file)
            count += len(part)
        return array("i", (number for _, number in heapq.merge(*(map(json.loads, file) for file in parts))))


def _short_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest())
