"""The step benchmark runs on the tiny model, counts what it says it counts, and writes its page."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import step_measures as measures
import step_report
import train_step as harness


def test_it_measures_engine_and_recipe_and_writes_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arms = ["mapo", "dpo", "recipe", "recipe-dpo"]
    command = ["train_step.py", "--size", "tiny", "--device", "cpu", "--rounds", "2", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "out"), "--arms", *arms])
    monkeypatch.setenv("MAPO_HOME", "replaced")
    harness.main()
    result = json.loads((tmp_path / "out" / "train_step_tiny_cpu.json").read_text())
    assert list(result["arms"]) == arms
    for found in result["arms"].values():
        assert len(found["seconds"]) == 2
        assert all(s > 0 for s in found["seconds"])
        assert found["pairs_per_s"] == pytest.approx(1 / found["median_s"])
        assert 0 < found["share_of_matmul"] < 1
    assert result["arms"]["recipe"]["operations_per_pair"] > result["arms"]["mapo"]["operations_per_pair"]
    page = (tmp_path / "out" / "train_step.md").read_text()
    assert "recipe: MaPO, as published" in page
    assert "engine against the recipe as published" in page


@pytest.mark.slow
def test_memory_of_one_arm_is_measured_in_its_own_process(tmp_path: Path) -> None:
    options = harness_options(tmp_path)
    found = {name: harness.in_own_process(name, options, 1) for name in ("mapo", "mapo-checkpointing")}
    assert all(f is not None for f in found.values())
    assert found["mapo-checkpointing"]["peak_live_bytes"] < found["mapo"]["peak_live_bytes"]


def harness_options(tmp_path: Path):
    from argparse import Namespace

    return Namespace(size="tiny", device="cpu", work=tmp_path, model=None, threads=1, memory_limit=4.0, batch=1)


def test_live_tensors_are_counted_once_and_forgotten_when_they_are_gone() -> None:
    before = torch.zeros(1000)
    with measures.LiveTensors() as live:
        a = before + 1  # 4000 bytes
        view = a[:10]
        assert (live.bytes, live.peak) == (4000, 4000)
        b = torch.cat([a, a])  # 8000 more
        assert live.bytes == 12000
        del a, view
        assert (live.bytes, live.peak) == (8000, 12000)
        b += 1
        assert live.bytes == 8000


def test_the_operations_of_a_method() -> None:
    operations = measures.Operations(unet_forward=10, unet_backward=11, vae=7, text=1)
    needed = {n: harness.pair_operations(a, operations) for n, a in harness.ARMS.items()}
    assert needed["mapo"] == needed["mapo-split"] == needed["mapo-checkpointing"] == 42
    assert needed["sft"] == 21
    assert needed["dpo"] == 62
    assert needed["recipe"] == needed["recipe-plain"] == 42 + 15
    assert needed["recipe-sft"] == 21 + 8
    assert needed["recipe-dpo"] == 62 + 15


def test_every_part_of_the_tiny_model_is_counted() -> None:
    operations = measures.count_operations("tiny")
    assert all(0 < count < 1e9 for count in operations.as_dict().values())


def test_a_ratio_is_that_of_the_same_rounds() -> None:
    found = measures.ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert found == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_goals_that_were_not_measured_say_so_and_missed_ones_are_bold() -> None:
    result = {
        "size": "reduced",
        "device": "cpu",
        "machine": "two cores",
        "arms": {},
        "ratios": {"engine against the recipe as published": {"median": 1.2, "low": 1.1, "high": 1.3}},
    }
    lines = step_report.goals([result])
    assert any("1.20: **no**" in line for line in lines)
    assert sum("not measured" in line for line in lines) >= 4
    result["ratios"]["engine against the recipe as published"]["median"] = 1.6
    assert any("1.60: yes" in line for line in step_report.goals([result]))


def test_the_table_of_cards_is_what_the_plan_does_with_the_computed_figures() -> None:
    rows = json.loads((Path(harness.OUT) / "train_step_predicted.json").read_text())["arms"]
    plans = {size: step_report.outcome(rows, size, "auto") for size in step_report.PRESETS}
    assert not plans["48GB"][0].gradient_checkpointing
    assert plans["8GB"][0].gradient_checkpointing
    for plan, need, room in plans.values():
        assert need <= room
        assert need == pytest.approx(step_report.computed_bytes(rows, plan) / 2**30)
    named = step_report.outcome(rows, "6GB", "6GB")
    assert named[0].base_precision == "nf4"
    assert named[1] == pytest.approx(2.68e9 / 2**30, abs=0.02)  # the row "split pairs, checkpointing, nf4"
    page = (harness.OUT / "train_step.md").read_text()
    for line in step_report.cards(rows):
        assert line in page
