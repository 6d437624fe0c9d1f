"""A full-size SD 1.5 single file, random weights, no network: it trains, and its LoRA has every key."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from safetensors import safe_open

from mapo_core.export import check_against_naming_rules, read_lora
from mapo_core.runs import read_events

from ..families.checkpoints import write_random_checkpoint
from .conftest import Run, run_here


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_full_size_sd15_single_file_trains_two_steps_at_64_pixels(
    new_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    checkpoint = tmp_path / "random sd15.safetensors"
    write_random_checkpoint("sd15", checkpoint)
    run = new_run(
        "full-size",
        model={"path": str(checkpoint)},
        data={"resolution": 64, "bucket_step": 64, "held_out": 0.1},
        adapter={"targets": ["attention", "feed_forward", "conv"]},
        training={"steps": 2, "train_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing": True},
        optimizer={"type": "adamw8bit"},
        validation={"prompts": ["a star"], "num_inference_steps": 2},
    )
    run_here(run)
    steps = [e for e in read_events(run.events) if e["type"] == "step"]
    assert len(steps) == 2
    assert all(math.isfinite(e["loss"]) for e in steps)
    file = run.export / "full-size.safetensors"
    assert len(read_lora(file).modules) > 250
    with safe_open(file, framework="pt") as tensors:
        check_against_naming_rules(tensors.keys(), "sd15")
