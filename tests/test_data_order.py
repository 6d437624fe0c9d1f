"""The order of the pairs: complete, repeatable, independent of batch size, accumulation and processes."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from mapo_core import data_order, large_split
from mapo_core.data_order import Draw, batches, divide_pairs, split_held_out, step_groups
from mapo_core.errors import PairsError
from mapo_core.pairs import PreferencePair


def draws(buckets: list, group: int, count: int, seed: int = 0, skip: int = 0) -> list:
    return list(islice(step_groups(buckets, group, seed, skip), count))


def test_every_pair_is_shown_once_per_epoch() -> None:
    buckets = ["a"] * 7 + ["b"] * 5
    shown = Counter((d.epoch, d.index) for g in draws(buckets, 4, 9) for d in g)
    assert set(shown.values()) == {1}
    assert {i for (epoch, i) in shown if epoch == 0} == set(range(12))


def test_groups_are_of_one_bucket_as_far_as_the_numbers_allow() -> None:
    buckets = ["a"] * 8 + ["b"] * 8
    assert all(len({buckets[d.index] for d in g}) == 1 for g in draws(buckets, 4, 40))


def test_a_set_smaller_than_a_group_collects_epochs() -> None:
    first = draws(["a"] * 3, 8, 1)[0]
    assert Counter(d.epoch for d in first) == {0: 3, 1: 3, 2: 2}


def test_skipping_gives_the_same_groups_as_going_through_them() -> None:
    buckets = ["a"] * 9 + ["b"] * 4
    assert draws(buckets, 4, 30)[13:] == draws(buckets, 4, 17, skip=13)


def test_another_seed_gives_another_order_and_seed_zero_is_a_seed() -> None:
    buckets = ["a"] * 32
    assert draws(buckets, 4, 8, seed=0) == draws(buckets, 4, 8, seed=0)
    assert draws(buckets, 4, 8, seed=0) != draws(buckets, 4, 8, seed=1)


def test_batches_are_of_one_bucket_and_keep_every_draw() -> None:
    buckets = ["a", "b"] * 8
    group = draws(buckets, 16, 1)[0]
    cut = batches(group, buckets, 3)
    assert sorted((d.epoch, d.index) for b in cut for d in b) == sorted((d.epoch, d.index) for d in group)
    assert all(len(b) <= 3 and len({buckets[d.index] for d in b}) == 1 for b in cut)


def test_held_out_pairs_share_no_chosen_image_with_the_others() -> None:
    groups = [f"image {i // 3}" for i in range(60)]
    train, held = split_held_out(groups, 0.2, seed=0)
    assert sorted(train + held) == list(range(60))
    assert len(held) == 12
    assert not {groups[i] for i in train} & {groups[i] for i in held}
    assert split_held_out(groups, 0.2, seed=0) == (train, held)
    assert split_held_out(groups, 0.2, seed=1) != (train, held)


def test_small_sets() -> None:
    assert split_held_out(["a"], 0.5, seed=0) == ([0], [])
    train, held = split_held_out(list("abcd"), 0.05, seed=0)
    assert (len(train), len(held)) == (3, 1)
    assert split_held_out(list("abcd"), 0.0, seed=0) == ([0, 1, 2, 3], [])
    assert split_held_out(["same"] * 5, 0.5, seed=0) == ([0, 1, 2, 3, 4], [])
    assert len(split_held_out([str(i) for i in range(10_000)], 0.5, seed=0)[1]) == 200


def plain_groups(buckets: list, group_size: int, seed: int) -> Iterator[list[Draw]]:
    """The order as it has been since the first version, in lists: a run that was begun then must go on in it."""
    waiting: list[Draw] = []
    epoch = 0
    while True:
        rng = random.Random(f"{seed}/order/{epoch}")
        order = list(range(len(buckets)))
        rng.shuffle(order)
        members: dict = {}
        for index in order:
            members.setdefault(buckets[index], []).append(Draw(epoch, index))
        groups: list[list[Draw]] = []
        for found in members.values():
            full = len(found) // group_size * group_size
            groups += [found[i : i + group_size] for i in range(0, full, group_size)]
            waiting += found[full:]
        while len(waiting) >= group_size:
            groups.append(waiting[:group_size])
            waiting = waiting[group_size:]
        rng.shuffle(groups)
        yield from groups
        epoch += 1


@pytest.mark.parametrize("seed", range(6))
def test_the_order_is_that_of_the_first_version(seed: int) -> None:
    rng = random.Random(seed)
    buckets = [(rng.choice([32, 40, 64]), 32) for _ in range(rng.choice([1, 3, 50, 700]))]
    group = rng.choice([1, 4, 16])
    expected = list(islice(plain_groups(buckets, group, seed), 200))
    assert draws(buckets, group, 200, seed) == expected
    for skip in (1, 7, 150, 199):
        assert draws(buckets, group, 1, seed, skip) == [expected[skip]]


def test_marked_pairs_are_held_out_and_the_share_gives_the_rest() -> None:
    groups = list("abcdefghij")
    marks: list[bool | None] = [None] * 10
    assert split_held_out(groups, 0.3, 0, marks=marks) == split_held_out(groups, 0.3, 0)
    marks[2], marks[7] = True, False
    train, held = split_held_out(groups, 0.3, seed=0, marks=marks)
    assert len(held) == 3
    assert 2 in held
    assert 7 in train
    assert split_held_out(groups, 0.0, seed=0, marks=marks)[1] == [2]
    assert split_held_out(groups, 0.1, seed=0, marks=marks)[1] == [2]  # the mark is the share
    assert 7 in split_held_out(groups, 0.9, seed=0, marks=marks)[0]


def test_a_mark_takes_the_pairs_of_the_same_image_with_it() -> None:
    groups = list("aabbcc")
    assert split_held_out(groups, 0.0, 0, marks=[True, None, None, None, None, None]) == ([2, 3, 4, 5], [0, 1])
    assert split_held_out(groups, 0.0, 0, marks=[True, False, None, None, None, None]) == ([1, 2, 3, 4, 5], [0])
    assert not {0, 1} & set(split_held_out(groups, 0.5, 0, marks=[None, False, None, None, None, None])[1])


def test_something_is_left_to_train_on() -> None:
    with pytest.raises(PairsError, match="Take the mark off"):
        split_held_out(list("ab"), 0.1, 0, marks=[True, True])


@pytest.mark.parametrize("seed", range(8))
def test_a_large_set_is_split_as_a_small_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    marks = [None] if seed < 4 else [None] * 8 + [True, False]
    pairs = [
        PreferencePair(
            prompt="", chosen=Path(f"/ü{rng.randint(0, 150)}"), rejected=Path("/r"), held_out=rng.choice(marks)
        )
        for _ in range(rng.choice([5, 300]))
    ]
    share = rng.choice([0.01, 0.1, 0.5, 0.0])
    small = divide_pairs(pairs, share, seed)
    monkeypatch.setattr(data_order, "LARGE", 0)
    monkeypatch.setattr(large_split, "_SORTED_AT_A_TIME", 40)
    assert tuple(map(list, divide_pairs(pairs, share, seed))) == tuple(map(list, small))


def test_a_large_set_that_cannot_be_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_order, "LARGE", 0)
    one = PreferencePair(prompt="", chosen=Path("/c"), rejected=Path("/r"))
    assert tuple(map(list, divide_pairs([one] * 9, 0.5, 0))) == (list(range(9)), [])
    with pytest.raises(PairsError, match="Every pair"):
        divide_pairs([one.model_copy(update={"held_out": True})] * 9, 0.5, 0)
