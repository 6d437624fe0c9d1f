"""Work in a process of its own: its answers, its errors, and its end."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mapo_core import errors
from mapo_core.runs import JobStoppedError, job, run_job


@pytest.fixture(autouse=True)
def stand_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "MAIN", Path(__file__).with_name("job_stand_in.py"))


def test_result_and_progress() -> None:
    told: list[tuple[Any, ...]] = []
    result = run_job("export", {"a": "ü 夜"}, progress=lambda *what: told.append(what))
    assert result == {"given": {"a": "ü 夜"}, "name": "export"}
    assert told == [("starting", 0, 2), ("done", 2, 2)]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("PairsError", errors.PairsError),
        ("ConfigError", errors.ConfigError),
        ("NoSuchError", errors.MapoError),
        ("annotations", errors.MapoError),
    ],
)
def test_an_error_keeps_its_kind_and_words(kind: str, expected: type[Exception]) -> None:
    with pytest.raises(errors.MapoError, match=r"^Pair 3: image is missing$") as caught:
        run_job("compare", {"error": kind})
    assert type(caught.value) is expected


def test_a_crash_says_its_last_words() -> None:
    with pytest.raises(errors.RunError, match="'compare' ended without a result: MemoryError: no memory left"):
        run_job("compare", {"crash": True})


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="looks for the process by its id")
@pytest.mark.parametrize("deaf", [False, True])
def test_a_stop_ends_the_child_within_seconds(deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_END_S", 1.0)
    pids: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if done == 1:
            pids.append(int(what))

    began = time.monotonic()
    with pytest.raises(JobStoppedError, match="Stopped: generate rejected"):
        run_job("generate_rejected", {"forever": True, "deaf": deaf}, progress=progress, should_stop=lambda: bool(pids))
    assert gone(pids[0])
    assert time.monotonic() - began < 60


@pytest.mark.skipif(sys.platform == "win32", reason="looks for the process by its id")
def test_an_error_in_the_face_ends_the_child_too() -> None:
    pids: list[int] = []

    def progress(what: str, done: int, total: int) -> None:
        if done == 1:
            pids.append(int(what))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job("compare", {"forever": True}, progress=progress)
    assert gone(pids[0])
