"""Killed at any write, or at any time, a run leaves nothing unreadable and goes on to the same weights."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mapo_core.runs import RunDir, clean_leftovers, disk, read_events, run_status

from .conftest import Run, lora_of, run_here

MAIN = Path(__file__).parents[2] / "mapo_core" / "__main__.py"
SETTINGS = {
    "training": {"steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 1},
    "optimizer": {"type": "adamw8bit", "learning_rate": 1e-2},
    "validation": {"every_steps": 1, "sample_every_steps": 1, "prompts": ["a star"]},
    "checkpoint": {"every_steps": 1, "keep": 1},
}


def forked(action: Callable[[], None], at: Callable[[str], None] | None = None) -> int:
    """Run `action` in a copy of this process, which has imported everything; `at` sees every fault point.

    Returns:
        Its exit code, negative for a signal.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if at is not None:
                disk._FAULT = "armed"
                disk._reach = lambda name, fault: at(name)
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def kill_at(wanted: str) -> Callable[[str], None]:
    def at(name: str) -> None:
        if name == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    return at


def session(run: RunDir) -> Callable[[], None]:
    def go() -> None:
        clean_leftovers(run)
        run_here(run)

    return go


def check_readable(run: RunDir, home: Path) -> None:
    """Every file that a reader would open can be read whole."""
    for folder in (run.path, home / "cache"):
        for path in folder.rglob("*"):
            hidden = any(part.startswith((".tmp-", ".old-")) for part in path.relative_to(folder).parts)
            if hidden or not path.is_file():
                continue
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".png":
                Image.open(path).load()
    for line in run.events.read_bytes().split(b"\n")[:-1] if run.events.exists() else []:
        json.loads(line)
    for checkpoint in run.list_checkpoints():
        assert {p.name for p in checkpoint.iterdir()} == {"lora.safetensors", "optimizer.safetensors", "state.json"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the copies are made with fork, which Windows has not")
@pytest.mark.timeout(600)
def test_a_kill_at_every_write_point(new_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    listing = tmp_path / "points.txt"

    def note(name: str) -> None:
        with listing.open("a") as file:
            file.write(name + "\n")

    whole = new_run("run", **SETTINGS)
    assert forked(session(whole), note) == 0
    names = list(dict.fromkeys(listing.read_text().splitlines()))
    assert {"events.jsonl:half", "cache:written", "step_00000001:filled", "export:written"} <= set(names)
    expected = lora_of(whole)
    for name in names:
        if name.startswith("cache:"):
            shutil.rmtree(tmp_path / "cache")  # so that there is something to write
        run = new_run("run", **SETTINGS)
        assert forked(session(run), kill_at(name)) == -signal.SIGKILL, name
        check_readable(run, tmp_path)
        assert forked(session(run)) == 0, name
        check_readable(run, tmp_path)
        assert read_events(run.events)[-1]["type"] == "run_finished"
        found = lora_of(run)
        assert all(torch.equal(found[k], expected[k]) for k in expected), name
        assert not [p for p in run.path.rglob("*") if p.name.startswith((".tmp-", ".old-"))]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.timeout(1800)
def test_a_kill_at_twenty_random_times(new_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    settings = {**SETTINGS, "training": {**SETTINGS["training"], "steps": 60}}
    settings["checkpoint"] = {"every_steps": 5, "keep": 2}
    settings["validation"] = {**SETTINGS["validation"], "every_steps": 10, "sample_every_steps": 20}
    whole = new_run("whole", **settings)
    run_here(whole)
    rng = random.Random(0)
    run = new_run("killed", **settings)
    command = [sys.executable, str(MAIN), "train", str(run.path), "--lifetime", "detached"]
    kills = 0
    for number in range(20):
        with run.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        count = len(run.events.read_bytes().splitlines()) if run.events.exists() else 0
        # Kill some time after the process has said its next words, or, every fourth time, during its imports.
        if number % 4:
            while process.poll() is None and len(run.events.read_bytes().splitlines()) <= count:
                time.sleep(0.05)
        time.sleep(rng.uniform(0, 3))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        check_readable(run, tmp_path)
        if run_status(run).state == "finished":
            run = new_run(f"killed-{number}", **settings)
            command[3] = str(run.path)
    assert kills >= 15
    run_here(run)
    assert all(torch.equal(a, b) for a, b in zip(lora_of(run).values(), lora_of(whole).values(), strict=True))
