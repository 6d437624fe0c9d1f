"""Several processes that train one run: every pair once, the same result, and none that waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_core.backward import shares
from mapo_core.data_order import step_groups
from mapo_core.runs import RunDir, read_events, run_status, start_run

from .conftest import Run, lora_of, relative_difference, run_here
from .test_equalities import ALONG_THE_GRADIENT, METHODS

MAIN = Path(__file__).parents[2] / "mapo_core" / "__main__.py"


def train_in_child(run: RunDir, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train as a face does; the child starts the processes by itself."""
    variables = {**os.environ, "MAPO_HOME": str(home), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(MAIN), "train", str(run.path), "--lifetime", "detached"]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=500, check=False)


def types(run: RunDir) -> list[str]:
    return [e["type"] for e in read_events(run.events)]


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LoKr's first factor starts at zero as a LoRA's up weight does, and is what `relative_difference` looks for."""
    return {name.replace("lokr_w1", "lora_B"): tensor for name, tensor in weights.items()}


def assert_equal(one: RunDir, two: RunDir, bound: float = 1e-5) -> None:
    """Losses and measures of all steps, and the weights of the first step, before rounding errors have grown."""
    assert types(two)[-1] == "run_finished"
    a, b = ([e["loss"] for e in read_events(r.events) if e["type"] == "step"] for r in (one, two))
    assert a == pytest.approx(b, rel=1e-5)
    a, b = ([e["margin"] for e in read_events(r.events) if e["type"] == "evaluated"] for r in (one, two))
    assert a == pytest.approx(b, rel=1e-3, abs=1e-6)
    assert types(two).count("sample_saved") == types(one).count("sample_saved")
    assert relative_difference(renamed(lora_of(one, step=1)), renamed(lora_of(two, step=1))) < bound
    assert (two.export / f"{two.name}.safetensors").exists()


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("pairs", [5, 23, 60])
def test_the_processes_share_every_pair_without_overlap(processes: int, pairs: int) -> None:
    """An epoch and more of a set that the processes do not divide: together they show what one process shows."""
    group = 2 * processes
    steps = pairs  # several epochs
    whole = list(islice(step_groups(["a", "b"] * pairs, group, 7), steps))
    seen: Counter[tuple[int, int]] = Counter()
    for draws in whole:
        parts = shares(draws, processes)
        assert [len(part) for part in parts] == [2] * processes
        assert [d for part in parts for d in part] == draws
        seen.update((d.epoch, d.index) for part in parts for d in part)
    assert set(seen.values()) == {1}  # no pair twice in an epoch
    assert {i for epoch, i in seen if epoch == 0} == set(range(2 * pairs))


def test_two_processes_of_one_setting_equal_one_process(new_run: Run, shared_home: Path) -> None:
    """With an epoch's rest of mixed sizes, so that one process has more batches than the other (test_sharding.py)."""
    settings: dict[str, Any] = {
        "optimizer": ALONG_THE_GRADIENT,
        "method": METHODS["mapo"],
        "data": {"held_out": 0.2, "flip": True},
        "validation": {"every_steps": 2, "sample_every_steps": 2},
        "checkpoint": {"every_steps": 1, "keep": 9},
    }
    batch = {"train_batch_size": 2, "steps": 4}
    one = new_run("whole", training={**batch, "gradient_accumulation_steps": 2}, **settings)
    run_here(one)
    two = new_run(
        "two",
        training={**batch, "gradient_accumulation_steps": 1, "processes": 2},
        **settings,
    )
    done = train_in_child(two, shared_home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert types(two).count("run_started") == 1
    assert_equal(one, two)


def test_two_processes_train_the_text_encoders_as_one_does(new_run: Run, shared_home: Path) -> None:
    settings: dict[str, Any] = {
        "adapter": {"text_encoder": True, "rank": 2, "targets": ["attention"], "text_encoder_2_learning_rate": 0.25},
        "optimizer": ALONG_THE_GRADIENT,
        "method": METHODS["diffusion_dpo"],
        "validation": {"every_steps": 2},
        "checkpoint": {"every_steps": 1, "keep": 9},
    }
    one = new_run(
        "text-one", training={"train_batch_size": 2, "gradient_accumulation_steps": 2, "steps": 2}, **settings
    )
    run_here(one)
    training = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "processes": 2, "steps": 2}
    two = new_run("text-two", training=training, **settings)
    done = train_in_child(two, shared_home)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = lora_of(one, step=1), lora_of(two, step=1)
    assert {k.partition(".")[0] for k in a} >= {"text_encoder", "text_encoder_2"}
    for part in ("", "text_encoder.", "text_encoder_2."):
        own = {k: v for k, v in a.items() if (k.startswith(part) if part else not k.startswith("text_encoder"))}
        assert relative_difference(own, {k: b[k] for k in own}) < 2e-5, part
    a, b = ([e["margin"] for e in read_events(r.events) if e["type"] == "evaluated"] for r in (one, two))
    assert a == pytest.approx(b, rel=1e-3, abs=1e-6)


FAULTS = {"raises": "raise RuntimeError('the second GPU is gone')", "killed": "os.kill(os.getpid(), signal.SIGKILL)"}


def with_fault(folder: Path, fault: str, step: int) -> str:
    """A PYTHONPATH with which the second process fails alone in a step, while the main one waits for its gradients."""
    (folder / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if os.environ.get('RANK') == '1':\n"
        "    import mapo_core.trainer as trainer\n"
        "    real = trainer.average_gradients\n"
        "    def fail(session):\n"
        f"        if session.step == {step}:\n"
        f"            {FAULTS[fault]}\n"
        "        real(session)\n"
        "    trainer.average_gradients = fail\n"
    )
    return os.pathsep.join([str(folder), str(MAIN.parents[1])])


@pytest.mark.parametrize("fault", ["killed", pytest.param("raises", marks=pytest.mark.slow)])
def test_one_that_fails_ends_all(new_run: Run, shared_home: Path, tmp_path: Path, fault: str) -> None:
    """The main process saves the last whole step, says what happened, and does not wait for the lost one."""
    run = new_run(f"fails-{fault}", training={"steps": 50, "processes": 2}, checkpoint={"every_steps": 0})
    done = train_in_child(run, shared_home, PYTHONPATH=with_fault(tmp_path, fault, step=3))
    ended = time.time()
    assert done.returncode != 0
    assert ("the second GPU is gone" in done.stderr) == (fault == "raises")
    last = read_events(run.events)[-1]
    assert last["type"] == "run_failed"
    assert "Another of the 2 training processes has ended" in last["message"]
    assert run_status(run).state == "failed"
    assert run.latest_checkpoint() == run.checkpoint_path(2)
    steps = [e for e in read_events(run.events) if e["type"] == "step"]
    assert ended - steps[-1]["time"] < 40


def test_a_stop_ends_all_and_keeps_the_work(new_run: Run) -> None:
    run = new_run("stops", training={"steps": 10_000, "processes": 2}, checkpoint={"every_steps": 0})
    handle = start_run(run, "tied", env={"OMP_NUM_THREADS": "1"})
    try:
        while run_status(run).step < 2 and handle.is_alive():
            time.sleep(0.05)
        assert handle.request("stop")
        status = handle.wait(120)
    finally:
        handle.kill()
    assert status.state == "stopped", run.log.read_text()[-3000:]
    assert run.latest_checkpoint() is not None
    assert (run.export / "stops.safetensors").exists()
