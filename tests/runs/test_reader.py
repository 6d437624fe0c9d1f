"""The reader that follows a run: it says what a full reading says, and never reads a line twice."""

from __future__ import annotations

import json
import random
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mapo_core.runs import EventWriter, RunDir, RunReader, read_events, reader_of, run_history, run_status

PID = {"pid": 1, "pid_started": 0.5}  # of a process that is gone


def line(kind: str, step: int | None, **fields: Any) -> bytes:
    return json.dumps({"v": 1, "time": 1.0, "type": kind, "step": step, **fields}).encode() + b"\n"


def steps(count: int, first: int = 1) -> bytes:
    return b"".join(line("step", n, steps=9, loss=1 / n) for n in range(first, first + count))


def random_course(rng: random.Random, length: int) -> list[bytes]:
    """Lines of a run with resumes, rollbacks, progress, missing numbers and lines that cannot be read."""
    found, step = [line("run_started", 0, steps=50, **PID)], 0
    for _ in range(length):
        kind = rng.choice(
            ["step"] * 6 + ["evaluated", "sample_saved", "warning", "progress", "back", "broken", "ready"]
        )
        if kind == "step":
            step += 1
            numbers = {"chosen_mse": rng.random(), "rejected_mse": rng.choice([None, rng.random()])}
            late = {"late": rng.random()} if rng.random() < 0.1 else {}
            found.append(line("step", step, steps=50, loss=rng.choice([None, rng.random()]), **numbers, **late))
        elif kind == "back":
            step = rng.randint(0, step)
            found.append(line(rng.choice(["rolled_back", "run_resumed"]), step, **PID))
        elif kind == "progress":
            found.append(line("phase", step, phase="measuring", done=rng.randint(0, 9), total=9))
        elif kind == "ready":
            found.append(line("phase", step, phase="ready"))
        elif kind == "broken":
            found.append(rng.choice([b"{\n", b"\n", b'{"type": "step"}\n']))
        else:
            found.append(line(kind, step, path=f"{rng.random()}.png", message="", accuracy=rng.random()))
    return found


def without_progress(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [e for e in events if e["type"] != "step" and e.get("total") is None]


@pytest.mark.parametrize("seed", range(12))
def test_it_says_what_a_full_reading_says_however_the_file_grew(run: RunDir, seed: int) -> None:
    rng = random.Random(seed)
    data = b"".join(random_course(rng, 300))
    reader = RunReader(run)
    written = 0
    while written < len(data):
        piece = data[written : written + rng.randint(1, 6000)]  # ends within a line
        with run.events.open("ab") as file:
            file.write(piece)
        written += len(piece)
        reader.poll()
        events = read_events(run.events)
        told = [e for e in events if e["type"] == "step"]
        assert without_progress(reader.events()) == without_progress(events)
        course = reader.curves(max_points=10**6)
        assert course.steps == [e["step"] for e in told]
        assert all(values == [e.get(n) for e in told] for n, values in course.values.items())
        assert reader.status() == RunReader(run).status()
        status = reader.status()
        assert status.step == ([e["step"] for e in events if e["type"] != "phase"] or [0])[-1]
        last = {k: v for k, v in told[-1].items() if k not in ("v", "time", "type", "step")} if told else {}
        assert status.metrics == last


def test_only_what_is_new_is_read(run: RunDir) -> None:
    """What was read can be spoilt in the file without anyone noticing."""
    run.events.write_bytes(line("run_started", 0, **PID) + steps(2000))
    reader = RunReader(run)
    assert reader.poll() == 2001
    with run.events.open("r+b") as file:
        file.write(b"x" * 50_000)
    with run.events.open("ab") as file:
        file.write(steps(3, first=2001))
    assert reader.poll() == 3
    assert reader.poll() == 0
    assert reader.curves(["loss"]).steps[-1] == 2003
    assert reader.step_count() == 2003


@pytest.mark.parametrize("what", ["cut", "replaced", "deleted"])
def test_another_file_under_the_name_is_read_anew(run: RunDir, what: str) -> None:
    run.events.write_bytes(line("run_started", 0, **PID) + steps(100) + line("evaluated", 100))
    reader = RunReader(run)
    assert reader.step_count() == 100
    if what == "cut":
        with run.events.open("r+b") as file:
            file.truncate(run.events.stat().st_size // 2)
    elif what == "replaced":
        run.events.write_bytes(line("run_started", 0, steps=7, **PID) + steps(300, first=1000))
    else:
        run.events.unlink()
    assert reader.events() == without_progress(read_events(run.events))
    assert reader.step_count() == sum(e["type"] == "step" for e in read_events(run.events))
    assert reader.status() == RunReader(run).status()
    assert reader.events("evaluated") == []


def test_a_progress_keeps_its_last_line_only(run: RunDir) -> None:
    told = [line("phase", None, phase="encoding images", done=n, total=500) for n in range(500)]
    run.events.write_bytes(line("run_started", 0, **PID) + b"".join(told) + line("phase", 0, phase="training"))
    shown = [(e["type"], e.get("phase"), e.get("done")) for e in RunReader(run).events()]
    assert shown == [("run_started", None, None), ("phase", "encoding images", 499), ("phase", "training", None)]


def test_a_step_ends_a_phase(run: RunDir) -> None:
    reader = RunReader(run)
    for told, phase in ((line("phase", 0, phase="drawing samples"), "drawing samples"), (steps(1), None)):
        with run.events.open("ab") as file:
            file.write(told)
        assert (reader.phase() or {}).get("phase") == phase


def test_curves_are_means_of_neighbours(run: RunDir) -> None:
    numbers = [(1.0, 2.0), (3.0, None), (None, None), (None, 5.0), (7.0, 8.0)]
    told = [line("step", n, chosen_mse=a, rejected_mse=b) for n, (a, b) in enumerate(numbers, start=1)]
    run.events.write_bytes(b"".join(told))
    course = RunReader(run).curves(["chosen_mse", "margin", "nothing"], max_points=3)
    assert course.steps == [2, 4, 5]
    assert course.values == {"chosen_mse": [2.0, None, 7.0], "margin": [1.0, None, 1.0], "nothing": [None] * 3}
    assert len(RunReader(run).curves(max_points=1).steps) == 1


def test_readers_in_several_threads_see_the_same(run: RunDir) -> None:
    reader, failures = reader_of(run), []
    done = threading.Event()

    def look(ask: Callable[[], Any]) -> None:
        try:
            while not done.is_set():
                ask()
        except Exception as error:
            failures.append(error)

    asks = (reader.status, reader.curves, reader.events, lambda: run_history(run), lambda: run_status(run))
    threads = [threading.Thread(target=look, args=(ask,)) for ask in asks]
    for thread in threads:
        thread.start()
    with EventWriter(run) as writer:
        for n in range(1, 400):
            writer.emit("step", n, loss=float(n))
            if n % 100 == 0:
                writer.emit("rolled_back", n - 50)
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert reader.curves(["loss"], 10**6).steps == [e["step"] for e in read_events(run.events) if e["type"] == "step"]


def test_a_step_costs_few_bytes(run: RunDir) -> None:
    fields = {f"metric {i}": i + 0.5 for i in range(10)}
    count = 5000
    run.events.write_bytes(b"".join(line("step", n, **fields) for n in range(count)))
    reader = RunReader(run)
    tracemalloc.start()
    try:
        reader.poll()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reader.kept_bytes >= count * 8 * 12
    assert kept < 1.5 * reader.kept_bytes + 1_000_000  # the block that was read last


def test_the_readers_that_are_kept_have_a_limit(home: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    from mapo_core.runs import create_run, reader

    run.events.write_bytes(steps(1000))
    first = reader_of(run)
    first.poll()
    assert reader_of(run) is first
    monkeypatch.setattr(reader, "_SHARED_BYTES", 10)
    reader_of(create_run("other", "{}", "", home))
    assert reader_of(run) is not first
