"""In which order pairs are trained, and how a step is cut into batches of one shape. Pure Python.

A step is a group of `group_size` pairs, drawn the same way whatever the batch size, the accumulation or the number
of processes; how the group is then cut into batches changes the speed and nothing else. Groups are of one bucket as
far as the numbers allow, so that batches are full.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence


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
    return islice(_groups(buckets, group_size, seed), skip, None)


def _groups(buckets: Sequence[Hashable], group_size: int, seed: int) -> Iterator[list[Draw]]:
    waiting: list[Draw] = []  # what the last epoch left over; a set smaller than a group collects several epochs
    epoch = 0
    while True:
        rng = random.Random(f"{seed}/order/{epoch}")
        order = list(range(len(buckets)))
        rng.shuffle(order)
        members: dict[Hashable, list[Draw]] = {}
        for index in order:
            members.setdefault(buckets[index], []).append(Draw(epoch, index))
        groups: list[list[Draw]] = []
        for draws in members.values():
            full = len(draws) // group_size * group_size
            groups += [draws[i : i + group_size] for i in range(0, full, group_size)]
            waiting += draws[full:]
        while len(waiting) >= group_size:
            groups.append(waiting[:group_size])
            waiting = waiting[group_size:]
        rng.shuffle(groups)
        yield from groups
        epoch += 1


def batches(group: Sequence[Draw], buckets: Sequence[Hashable], batch_size: int) -> list[list[Draw]]:
    """Cut a group into batches of at most `batch_size` pairs, each of one bucket."""
    members: dict[Hashable, list[Draw]] = {}
    for draw in group:
        members.setdefault(buckets[draw.index], []).append(draw)
    return [d[i : i + batch_size] for d in members.values() for i in range(0, len(d), batch_size)]


def split_held_out(
    groups: Sequence[Hashable], share: float, seed: int, at_most: int = 200
) -> tuple[list[int], list[int]]:
    """Indices to train on and indices to hold out.

    Args:
        groups: what must not be split between the two, for example each pair's chosen image.
        share: share of the pairs to hold out, 0-1; of 4 pairs or more, at least one is held out unless it is 0.
        seed: seed of the run.
        at_most: largest number of pairs held out.
    """
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
