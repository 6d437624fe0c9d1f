"""The ladder of savings as arithmetic: what is asked for, what is added in which order, what is never touched."""

from __future__ import annotations

from typing import Any

import pytest

from mapo_core import build_config
from mapo_core.memory_plan import (
    GIB,
    PRESETS,
    RUNGS,
    Plan,
    budget_of,
    first_plan,
    next_rung,
    open_checkpointing,
    plan_text,
    spilled,
    with_plan,
)


def config(**groups: Any):
    base: dict[str, Any] = {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p.jsonl"}}
    return build_config({**base, **groups})


def climb(asked: Any, plan: Plan | None = None, **how: Any) -> list[str]:
    plan, names = plan or first_plan(asked), []
    while following := next_rung(plan, asked, **how):
        rung, plan = following
        names.append(rung.name)
    return names


def test_the_defaults_are_todays_behaviour() -> None:
    asked = config()
    plan = first_plan(asked)
    assert plan == Plan(
        gradient_checkpointing=True,
        optimizer="adamw8bit",
        split_pairs=False,
        base_precision="full",
        offload_share=0.0,
        train_batch_size=1,
        gradient_accumulation_steps=16,
    )
    done = with_plan(asked, plan)
    assert done.training == asked.training.model_copy(update={"gradient_checkpointing": True})
    assert done.optimizer == asked.optimizer


@pytest.mark.parametrize("size", ["auto", "manual", "8GB", "48GB"])
def test_what_old_settings_say_of_checkpointing_they_still_say(size: str) -> None:
    """Settings written while it was on or off and nothing else: a card's size wins over them, as it did."""
    for said in (True, False):
        asked = config(training={"gradient_checkpointing": said}, memory={"plan": size})
        expected = {"8GB": True, "48GB": False}.get(size, said)
        assert first_plan(asked).gradient_checkpointing == expected
        assert not open_checkpointing(asked)


@pytest.mark.parametrize(
    ("memory", "found_out", "at_first"),
    [
        ({}, True, True),
        ({"plan": "8GB"}, True, True),
        ({"plan": "48GB"}, True, False),
        ({"plan": "manual"}, False, True),
        ({"plan": "manual", "preflight": "on"}, False, True),
        ({"preflight": "off"}, False, True),
    ],
)
def test_checkpointing_that_is_left_open_is_on_until_something_says_that_it_is_not_needed(
    memory: dict[str, str], found_out: bool, at_first: bool
) -> None:
    asked = config(memory=memory)
    assert open_checkpointing(asked) == found_out
    assert first_plan(asked).gradient_checkpointing == at_first
    assert with_plan(asked, first_plan(asked)).training.gradient_checkpointing == at_first


def test_a_plan_in_words() -> None:
    assert plan_text(config(memory={"plan": "manual"})) == (
        "Begins with full base, gradient checkpointing, batch 1 x 16, adamw8bit. Nothing is added: a run that does not "
        "fit ends with an error."
    )
    words = plan_text(config(memory={"plan": "6GB", "offload": "on"}, training={"train_batch_size": 4}))
    assert words.startswith("Begins with base in nf4, gradient checkpointing, split pairs, 50% of the base offloaded, ")
    assert "batch 1 x 64" in words
    assert words.endswith("More savings are added while a measured step does not fit.")


def test_auto_adds_the_exact_savings_first_and_the_slow_ones_last() -> None:
    asked = config(
        training={"gradient_checkpointing": False, "train_batch_size": 4, "gradient_accumulation_steps": 2},
        optimizer={"type": "adamw"},
    )
    assert climb(asked) == [
        "gradient checkpointing",
        "8-bit Adam",
        "split pairs",
        "smaller batch",
        "smaller batch",
        "base in int8",
        "base in nf4",
        "half of the base offloaded",
        "all of the base offloaded",
    ]
    assert all(rung.cost for rung in RUNGS)


def test_pairs_per_step_never_change() -> None:
    asked = config(training={"train_batch_size": 6, "gradient_accumulation_steps": 5})
    plan, sizes = first_plan(asked), []
    while following := next_rung(plan, asked):
        plan = following[1]
        assert plan.train_batch_size * plan.gradient_accumulation_steps == 30
        sizes.append(plan.train_batch_size)
    assert sizes[-1] == 1
    assert 3 in sizes


def test_what_the_user_sets_stands() -> None:
    asked = config(
        memory={"plan": "6GB", "split_pairs": "off", "base_precision": "full", "offload": "off"},
        optimizer={"type": "adamw8bit"},
    )
    plan = first_plan(asked)
    assert (plan.split_pairs, plan.base_precision, plan.offload_share) == (False, "full", 0.0)
    assert climb(asked) == []


def test_manual_changes_nothing_before_training_but_saves_a_run_in_the_middle() -> None:
    asked = config(memory={"plan": "manual"}, training={"gradient_checkpointing": False})
    assert climb(asked) == []
    assert climb(asked, later=True) == ["gradient checkpointing", "split pairs"]


def test_in_the_middle_nothing_changes_the_base_or_the_optimizer() -> None:
    asked = config(optimizer={"type": "adamw"}, training={"gradient_checkpointing": False, "train_batch_size": 2})
    assert climb(asked, later=True) == ["gradient checkpointing", "split pairs", "smaller batch"]
    assert climb(asked, later=True, can_split=False) == ["gradient checkpointing", "smaller batch"]


@pytest.mark.parametrize("name", PRESETS)
def test_smaller_cards_start_with_more_savings(name: str) -> None:
    asked = config(memory={"plan": name}, training={"train_batch_size": 4}, optimizer={"type": "adamw"})
    plan = first_plan(asked)
    size = int(name.removesuffix("GB"))
    assert plan.gradient_checkpointing == (size < 48)
    assert plan.split_pairs == (size <= 12)
    assert plan.base_precision == {6: "nf4", 8: "int8"}.get(size, "full")
    assert plan.optimizer == ("adamw8bit" if size <= 16 else "adamw")
    assert plan.train_batch_size == (1 if size <= 10 else 4)
    assert plan.train_batch_size * plan.gradient_accumulation_steps == 64


def test_nothing_is_quantised_back() -> None:
    asked = config()
    plan = first_plan(asked).model_copy(update={"base_precision": "nf4"})
    assert "base in int8" not in climb(asked, plan)
    assert climb(asked, can_offload=False) == ["split pairs", "base in int8", "base in nf4"]


def test_a_named_size_bounds_what_is_there() -> None:
    assert budget_of("auto", 24 * GIB) == 24 * GIB
    assert budget_of("manual", 24 * GIB) == 24 * GIB
    assert 7 * GIB < budget_of("8GB", 24 * GIB) < 8 * GIB
    assert budget_of("8GB", 3 * GIB) == 3 * GIB


@pytest.mark.parametrize(
    ("seconds", "expected", "used", "found"),
    [
        ([9.0] * 5, 2.0, 0.97, True),
        ([9.0] * 5, 2.0, 0.6, False),  # slow, but there is room
        ([2.1] * 5, 2.0, 0.99, False),  # full, but quick
        ([9.0] * 4, 2.0, 0.97, False),  # too early to say
        ([2.0, 2.0, 30.0, 2.0, 30.0], 2.0, 0.97, False),  # pictures in between
        ([2.0] * 20 + [9.0] * 5, 2.0, 0.97, True),  # all at once
        ([9.0] * 5, 0.0, 0.97, False),  # nothing to compare with
    ],
)
def test_spill_into_system_memory_is_told_by_speed(
    seconds: list[float], expected: float, used: float, found: bool
) -> None:
    assert spilled(seconds, expected, used) is found
