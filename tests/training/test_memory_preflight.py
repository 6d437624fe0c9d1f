"""What a run would need, as the command and the job say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mapo_core import build_config
from mapo_core.cli import main
from mapo_core.jobs import preflight as job
from mapo_core.pairs import PreferencePair, read_pairs
from mapo_core.preflight import cache_bytes, largest_pair

from .conftest import Run


def test_the_command_says_memory_pace_time_disk_and_savings(
    new_run: Run, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = new_run("for-its-pairs")
    out = tmp_path / "needs.json"
    arguments = ["preflight", "--model", str(tiny_model), "--pairs", str(run.pairs), "--json", str(out)]
    settings = {
        "data.resolution": 32,
        "training.device": "cpu",
        "training.steps": 50,
        "training.train_batch_size": 4,
        "memory.plan": "10GB",
    }
    assert main([*arguments, *(part for k, v in settings.items() for part in (f"--{k}", str(v)))]) == 0
    said, needs = capsys.readouterr().out, json.loads(out.read_text())
    assert "s per step" in said
    assert "split pairs" in said
    assert needs["plan"]["split_pairs"]
    assert needs["plan"]["train_batch_size"] == 1
    assert needs["plan"]["gradient_accumulation_steps"] == 64
    assert needs["seconds_total"] == pytest.approx(50 * needs["seconds_per_step"])
    assert 0 < needs["peak_memory_bytes"] < needs["budget_bytes"] <= 10 * 2**30
    assert not list(run.path.parent.glob("mapo-preflight*"))


def test_the_job_needs_no_pairs_and_trains_nothing(new_run: Run, tiny_model: Path, shared_home: Path) -> None:
    own = new_run("sets-the-home").path.parent
    runs = sorted(shared_home.rglob("runs/*"))
    settings: dict[str, Any] = {
        "name": "x",
        "model": {"path": str(tiny_model)},
        "data": {"pairs": "none", "resolution": 32},
        "method": {"type": "sft"},
        "training": {"device": "cpu", "gradient_accumulation_steps": 2},
    }
    said: list[str] = []
    found = job({"settings": settings, "pairs": None}, lambda what, done, total: said.append(what))
    assert said
    assert found["device"] == "cpu"
    assert found["resolution"] == 32
    assert found["rungs"] == []
    assert found["base_error"] is None
    assert "GiB" in found["text"]
    json.dumps(found)
    assert sorted(shared_home.rglob("runs/*")) == runs
    assert [folder.name for folder in own.iterdir()] == ["sets-the-home"]


def test_the_largest_pair_and_the_disk_of_the_cache(new_run: Run) -> None:
    pairs = read_pairs(new_run("sizes").pairs)
    config = build_config(
        {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p", "resolution": 32, "bucket_step": 8}}
    )
    found = largest_pair(pairs, config, 32)
    square = [p for p in pairs if int(p.chosen.stem.split("-")[1]) % 3]
    assert found.chosen in {p.chosen for p in square}
    assert len(found.prompt) == max(len(p.prompt) for p in square)
    one = PreferencePair(prompt="a", chosen=Path("a.png"), rejected=Path("b.png"))
    two = PreferencePair(prompt="a", chosen=Path("a.png"), rejected=Path("c.png"))
    # three images of 16 latents with 4 channels, mean and spread in 4 bytes; one prompt and the empty one
    assert cache_bytes([one, two], config, 16, 100) == 3 * 16 * 4 * 2 * 4 + 2 * 100
