"""The training process as the faces start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mapo_core.runs import RunDir, attach, read_events, run_status, start_run

from .conftest import Run, lora_of

LONG = {"training": {"steps": 5000}, "checkpoint": {"every_steps": 2, "keep": 1}}


def wait_for(condition: Callable[[], object], seconds: float = 90) -> float:
    """Wait until a condition holds; how long it took, seconds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "waited too long"
        time.sleep(0.02)
    return time.monotonic() - began


def stepped(run: RunDir, steps: int) -> Callable[[], bool]:
    return lambda: sum(e["type"] == "step" for e in read_events(run.events)) >= steps


def test_a_stop_is_acknowledged_within_a_second_and_leaves_a_lora(new_run: Run) -> None:
    run = new_run("stopped", **LONG)
    handle = start_run(run)
    wait_for(stepped(run, 3))
    handle.request("stop")
    assert wait_for(lambda: any(e.get("phase") == "stopping" for e in read_events(run.events))) < 1
    status = handle.wait(60)
    assert status.state == "stopped"
    assert (run.export / "stopped.safetensors").exists()
    assert lora_of(run)
    assert run.latest_checkpoint() == run.checkpoint_path(status.step)


@pytest.mark.skipif(os.name == "nt", reason="kills the parent with SIGKILL")
def test_a_tied_child_saves_and_ends_when_its_parent_is_killed(new_run: Run) -> None:
    run = new_run("tied", **LONG)
    root = Path(__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "from mapo_core.runs import open_run, start_run\n"
        f"start_run(open_run({str(run.path)!r})).wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(stepped(run, 2))
    child = attach(run)
    assert child is not None
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not child.is_alive())
    assert run_status(run).state == "stopped"
    assert (run.export / "tied.safetensors").exists()


def test_a_failure_becomes_an_event_with_its_cause(new_run: Run) -> None:
    run = new_run("failing")
    run.pairs.write_text('{"prompt": "a star", "chosen": "/no/such/a.png", "rejected": "/no/such/b.png"}\n')
    status = start_run(run).wait(90)
    assert status.state == "failed"
    assert "/no/such/a.png" in status.message
    broken = new_run("unreadable")
    broken.config.write_text('{"name": "x"}')
    status = start_run(broken).wait(90)
    assert status.state == "failed"
    assert "Field required" in status.message
