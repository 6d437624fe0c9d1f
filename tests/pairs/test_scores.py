"""Preference scores: normalised over the whole set, and an error where they are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mapo_core.errors import PairsError
from mapo_core.pairs import PreferencePair
from mapo_core.pairs.scores import normalised_scores, require_scores


def pair(chosen: float | None, rejected: float | None) -> PreferencePair:
    return PreferencePair(
        prompt="p", chosen=Path("a.png"), rejected=Path("b.png"), chosen_score=chosen, rejected_score=rejected
    )


def test_scores_are_normalised_over_all_images_of_the_set() -> None:
    found = normalised_scores([pair(22.0, 18.0), pair(20.0, 19.0)])
    assert found == [(1.0, 0.0), (0.5, 0.25)]


@pytest.mark.parametrize("scores", [[(1.0, 1.0)], [(1.0, None)], []])
def test_nothing_to_normalise(scores: list[tuple[float | None, float | None]]) -> None:
    assert normalised_scores([pair(*s) for s in scores]) is None


def test_every_pair_without_scores_is_named() -> None:
    with pytest.raises(
        PairsError, match=r"smpo needs a chosen_score.*2 of 3 pairs have none, the first is pair 2"
    ) as e:
        require_scores([pair(1, 0), pair(None, 0), pair(1, None)], "smpo")
    assert e.value.problems == ["pair 2: no scores", "pair 3: no scores"]


def test_scores_that_are_all_the_same_say_nothing() -> None:
    with pytest.raises(PairsError, match="all scores of the pairs are the same"):
        require_scores([pair(1, 1), pair(1, 1)], "smpo")


def test_scores_pass() -> None:
    require_scores([pair(1, 0)], "smpo")
