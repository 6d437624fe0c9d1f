"""Intervals, win rates, diversity and the report: by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from mapo_core.evaluate import Interval, mean_interval
from mapo_core.evaluate.diversity import diversity_of
from mapo_core.evaluate.held_out import HeldOutErrors
from mapo_core.evaluate.outside import GENERAL_PROMPTS, outside_prompts
from mapo_core.evaluate.report import compare_scores
from mapo_core.runs import nulls_for_nonfinite


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(200):
        interval = mean_interval(rng.normal(3.0, 1.0, size=40).tolist(), seed=seed)
        assert interval.low <= interval.value <= interval.high
        inside += interval.low <= 3.0 <= interval.high
    assert 178 <= inside <= 198  # the percentile bootstrap is a little narrow at 40


def test_values_of_one_prompt_are_resampled_together() -> None:
    """Ten times the same value for a prompt is no more evidence than once."""
    values = [0.0, 1.0, 0.2, 0.9, 0.4, 0.6]
    once = mean_interval(values)
    tenfold = [v for v in values for _ in range(10)]
    groups = [i for i in range(6) for _ in range(10)]
    grouped = mean_interval(tenfold, groups)
    assert grouped.value == pytest.approx(once.value)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    alone = mean_interval(tenfold)
    assert alone.high - alone.low < 0.5 * (grouped.high - grouped.low)


def test_groups_of_unequal_size_keep_the_plain_mean() -> None:
    assert mean_interval([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]).value == 0.75


def test_win_rate_counts_ties_as_half_and_leaves_out_what_cannot_be_judged() -> None:
    nan = float("nan")
    found = compare_scores("x", "X", [1, 2, 3, nan, 5], [2, 2, 1, 9, nan], ["a", "a", "b", "b", "c"])
    assert found is not None
    assert found.win_rate.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert found.difference.value == pytest.approx((1 + 0 - 2) / 3)
    assert (found.base.value, found.lora.value) == pytest.approx((2, 5 / 3))
    assert found.pictures == 3
    assert compare_scores("x", "X", [nan], [1.0], ["a"]) is None


def test_diversity_by_hand() -> None:
    """Two prompts of two seeds: base at 0 and 90 degrees, the LoRA always the same picture."""
    base = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    same = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    found = diversity_of(base, same, 2, "by hand")
    assert found.base.value == pytest.approx(0.5)
    assert found.lora.value == pytest.approx(0)
    assert found.difference.value == pytest.approx(-0.5)
    assert found.prompts == 2
    three = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    assert diversity_of(three, three, 3, "by hand").base.value == pytest.approx((1 + 2 + 1) / 3)


def test_held_out_errors_are_summed_up() -> None:
    found = HeldOutErrors([4, 4, 9, 9], [0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.5, 0.4], 2, [0, 1, 0, 1])
    assert found.correct == [1, 0, 1, 0]  # equal errors are not a success
    summary = found.summary()
    assert (summary.accuracy, summary.pairs, summary.draws) == (0.5, 2, 2)
    assert summary.margin == pytest.approx(0.3 - 0.25)


def test_outside_prompts_leave_out_what_was_trained() -> None:
    assert outside_prompts("sdxl", []) == list(GENERAL_PROMPTS)
    assert outside_prompts("sdxl", GENERAL_PROMPTS[1:]) == [GENERAL_PROMPTS[0]]
    assert outside_prompts("sdxl", ["a"], ["a", "b", "b"]) == ["b"]
    demo = outside_prompts("demo", [])
    assert all("background" in p for p in demo)


def test_json_has_null_where_a_number_is_not_finite() -> None:
    values = nulls_for_nonfinite({"a": [1.0, float("nan")], "b": (float("inf"), Interval(1, 0, 2).as_dict())})
    text = json.dumps(values, allow_nan=False)
    assert json.loads(text) == {"a": [1.0, None], "b": [None, {"value": 1, "low": 0, "high": 2}]}
    assert math.isfinite(values["a"][0])
