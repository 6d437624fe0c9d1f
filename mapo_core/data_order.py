"""In which order pairs are trained, and how a step is cut into batches of one shape; a few bytes per pair.

A step is a group of `group_size` pairs, drawn the same way whatever the batch size, the accumulation or the number
of processes; how the group is then cut into batches changes the speed and nothing else. Groups are of one bucket as
far as the numbers allow, so that batches are full.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import PairsError
from .large_split import split_large

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    from .pairs import PreferencePair

LARGE = 50_000  # of larger sets the names of the images are not held in memory at once


@dataclass(frozen=True)
class Draw:
    """One showing of a pair; its randomness is seeded by these two numbers and the run's seed."""

    epoch: int
    index: int


def step_groups(buckets: Sequence[Hashable], group_size: int, seed: int, skip: int = 0) -> Iterator[list[Draw]]:
    """Endless groups of `group_size` draws, every pair once per epoch.

    Args:
        buckets: the bucket of each pair.
        group_size: pairs per optimizer step.
        seed: seed of the run.
        skip: groups already trained; the next one is yielded first.
    """
    return _groups(_numbered(buckets), group_size, seed, skip)


def _numbered(buckets: Sequence[Hashable]) -> np.ndarray:
    """The buckets as small numbers, [N]; two bytes per pair."""
    numbers: dict[Hashable, int] = {}
    return np.fromiter((numbers.setdefault(b, len(numbers)) for b in buckets), np.uint16, len(buckets))


def _groups(buckets: np.ndarray, group_size: int, seed: int, skip: int) -> Iterator[list[Draw]]:
    waiting: list[Draw] = []  # what the last epoch left over; a set smaller than a group collects several epochs
    epoch = 0
    while True:
        rng = random.Random(f"{seed}/order/{epoch}")
        shuffled = array("i", range(len(buckets)))  # four bytes per pair; a list of numbers would take forty
        rng.shuffle(shuffled)
        order = np.frombuffer(shuffled, np.int32)
        in_order = buckets[order]
        full: list[np.ndarray] = []  # [groups, group_size] of each bucket, the one that comes first in order first
        for bucket in _by_first_place(in_order):
            members = order[in_order == bucket]
            count = len(members) // group_size * group_size
            full.append(members[:count].reshape(-1, group_size))
            waiting += [Draw(epoch, int(i)) for i in members[count:]]
        mixed = [waiting[i : i + group_size] for i in range(0, len(waiting) - group_size + 1, group_size)]
        waiting = waiting[len(mixed) * group_size :]
        ends = np.cumsum([len(part) for part in full])
        numbers = array("i", range(int(ends[-1]) + len(mixed)))
        rng.shuffle(numbers)
        passed = min(skip, len(numbers))
        skip -= passed
        for number in numbers[passed:]:
            if number >= ends[-1]:
                yield mixed[number - int(ends[-1])]
                continue
            part = int(np.searchsorted(ends, number, side="right"))
            row = full[part][number - (int(ends[part - 1]) if part else 0)]
            yield [Draw(epoch, int(i)) for i in row]
        epoch += 1


def _by_first_place(values: np.ndarray) -> list[int]:
    """The different values, the one that comes first first."""
    found, first = np.unique(values, return_index=True)
    return [int(v) for v in found[np.argsort(first)]]


def batches(group: Sequence[Draw], buckets: Sequence[Hashable], batch_size: int) -> list[list[Draw]]:
    """Cut a group into batches of at most `batch_size` pairs, each of one bucket."""
    members: dict[Hashable, list[Draw]] = {}
    for draw in group:
        members.setdefault(buckets[draw.index], []).append(draw)
    return [d[i : i + batch_size] for d in members.values() for i in range(0, len(d), batch_size)]


def divide_pairs(pairs: Sequence[PreferencePair], share: float, seed: int) -> tuple[Sequence[int], Sequence[int]]:
    """Indices of the pairs to train on and of those to hold out: as the pairs say, and the rest as the share says.

    Raises:
        PairsError: every pair is marked as held out.
    """
    if len(pairs) > LARGE:
        return split_large(pairs, share, seed)
    known = [(str(p.chosen), p.held_out) for p in pairs]  # one way through: a long list is read from disk
    return split_held_out([image for image, _ in known], share, seed, marks=[mark for _, mark in known])


def split_held_out(
    groups: Sequence[Hashable],
    share: float,
    seed: int,
    at_most: int = 200,
    marks: Sequence[bool | None] | None = None,
) -> tuple[list[int], list[int]]:
    """Indices to train on and indices to hold out.

    Args:
        groups: what must not be split between the two, for example each pair's chosen image.
        share: share of the pairs to hold out, 0-1; of 4 pairs or more, at least one is held out unless it is 0.
        seed: seed of the run.
        at_most: largest number of pairs held out by the share.
        marks: one per pair: True holds it out, with the unmarked pairs of its group, and counts into the share; False
            trains on it, with the unmarked pairs of its group; None leaves it to the share. None: no pair is marked.

    Raises:
        PairsError: every pair is marked as held out.
    """
    if marks is not None and any(mark is not None for mark in marks):
        return _split_marked(groups, share, seed, at_most, marks)
    count = len(groups)
    wanted = min(at_most, round(count * share))
    if share > 0 and count >= 4:
        wanted = max(1, wanted)
    order = sorted(set(groups), key=str)
    random.Random(f"{seed}/held_out").shuffle(order)
    sizes: dict[Hashable, int] = {}
    for group in groups:
        sizes[group] = sizes.get(group, 0) + 1
    chosen: set[Hashable] = set()
    taken = 0
    for group in order:
        if taken >= wanted:
            break
        if taken + sizes[group] <= wanted or not chosen:
            chosen.add(group)
            taken += sizes[group]
    held = [i for i, g in enumerate(groups) if g in chosen]
    train = [i for i, g in enumerate(groups) if g not in chosen]
    return (train, held) if train else (list(range(count)), [])


def _split_marked(
    groups: Sequence[Hashable], share: float, seed: int, at_most: int, marks: Sequence[bool | None]
) -> tuple[list[int], list[int]]:
    """The marked groups as they are marked; what the share still lacks is drawn from the others."""
    held_groups = {g for g, mark in zip(groups, marks, strict=True) if mark}
    kept_groups = {g for g, mark in zip(groups, marks, strict=True) if mark is False} - held_groups
    held = {i for i, (g, mark) in enumerate(zip(groups, marks, strict=True)) if mark is not False and g in held_groups}
    if len(held) == len(groups):
        raise PairsError("Every pair is marked as held out, so none is left to train on. Take the mark off some.")
    free = [i for i, g in enumerate(groups) if g not in held_groups and g not in kept_groups]
    lacking = min(at_most, round(len(groups) * share)) - len(held)
    if lacking > 0 and free:
        held.update(free[i] for i in split_held_out([groups[i] for i in free], lacking / len(free), seed, at_most)[1])
    return [i for i in range(len(groups)) if i not in held], sorted(held)
