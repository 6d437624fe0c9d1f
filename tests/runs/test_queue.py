"""The queue: order, one at a time per device, and what becomes of it when its process or a run dies."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mapo_core.errors import RunError
from mapo_core.runs import (
    RunDir,
    add_to_queue,
    attach,
    create_run,
    end_run,
    ensure_queue_runner,
    move_in_queue,
    process_start_time,
    queue_entries,
    queue_state,
    read_events,
    remove_from_queue,
    run_queue,
    run_status,
)
from mapo_core.runs import queue as queue_module


@pytest.fixture
def runner_pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The queue's processes, as they are started."""
    pids: list[int] = []
    real = subprocess.Popen

    def popen(command: Any, **more: Any) -> Any:
        process = real(command, **more)
        if "queue" in command:
            pids.append(process.pid)
        return process

    monkeypatch.setattr(queue_module.subprocess, "Popen", popen)
    monkeypatch.setattr(queue_module, "_spawned", {})
    return pids


def times(run: RunDir, kind: str) -> list[float]:
    return [event["time"] for event in read_events(run.events) if event["type"] == kind]


def finished(*runs: RunDir) -> bool:
    return all(run_status(run).state == "finished" for run in runs)


def test_runs_train_one_after_the_other(
    make_run: Callable[..., RunDir], home: Path, until: Any, runner_pids: list[int]
) -> None:
    first, second, third = (make_run(step_s=0.1) for _ in range(3))
    assert [add_to_queue(run) for run in (first, second)] == [0, 1]
    add_to_queue(third, first=True)
    until(lambda: finished(first, second, third))
    order = sorted((first, second, third), key=lambda run: times(run, "run_started"))
    for before, after in itertools.pairwise(order):
        assert times(before, "run_finished")[0] <= times(after, "run_started")[0]
    assert order.index(third) < order.index(second)
    until(lambda: queue_entries(home) == [])
    until(lambda: all(process_start_time(pid) is None for pid in runner_pids))
    assert len(runner_pids) == 1


def test_devices_do_not_wait_for_each_other(make_run: Callable[..., RunDir], until: Any) -> None:
    runs = [make_run(steps=500, step_s=0.05, training={"device": device}) for device in ("auto", "cuda:0", "cuda:1")]
    assert [add_to_queue(run) for run in runs] == [0, 1, 0]
    until(lambda: run_status(runs[0]).step and run_status(runs[2]).step)
    assert run_status(runs[1]).state == "created"
    assert queue_state(runs[1], run_status(runs[1]), runs[1].path.parents[1]) == "waiting"


def test_a_killed_queue_loses_nothing_and_starts_nothing_twice(
    make_run: Callable[..., RunDir], home: Path, until: Any, runner_pids: list[int]
) -> None:
    first, second = make_run(steps=40, step_s=0.05), make_run()
    add_to_queue(first)
    add_to_queue(second)
    until(lambda: run_status(first).step > 2)
    os.kill(runner_pids[0], signal.SIGKILL)
    until(lambda: process_start_time(runner_pids[0]) is None)
    step = run_status(first).step
    until(lambda: run_status(first).step > step)  # the training does not notice
    assert [entry.run for entry in queue_entries(home) if entry.waiting] == [second.name]
    assert ensure_queue_runner(home)
    until(lambda: finished(first, second))
    assert times(first, "run_finished")[0] <= times(second, "run_started")[0]
    assert [len(times(run, "run_started")) for run in (first, second)] == [1, 1]


def test_a_queue_that_dies_between_start_and_note(
    make_run: Callable[..., RunDir], home: Path, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process is there, the list does not say so yet: the next queue finds it by its lock and leaves it alone."""
    run = make_run(steps=60, step_s=0.05)
    monkeypatch.setattr(queue_module, "ensure_queue_runner", lambda home: False)
    add_to_queue(run)

    class Died(BaseException):
        pass

    real = queue_module.start_run

    def start_and_die(*args: Any) -> Any:
        real(*args)
        raise Died

    monkeypatch.setattr(queue_module, "start_run", start_and_die)
    with pytest.raises(Died):
        run_queue(home)
    assert [entry.waiting for entry in queue_entries(home)] == [True]
    monkeypatch.setattr(queue_module, "start_run", real)
    until(lambda: run_status(run).step > 0)
    assert run_queue(home)
    assert queue_entries(home) == []
    assert len(times(run, "run_started")) == 1
    assert run_status(run).alive


def test_two_queues_at_once(make_run: Callable[..., RunDir], home: Path, until: Any) -> None:
    run = make_run(steps=30, step_s=0.05)
    add_to_queue(run)
    until(lambda: run_status(run).step > 0)
    assert run_queue(home) is False
    many = [make_run() for _ in range(4)]
    threads = [threading.Thread(target=add_to_queue, args=(one,)) for one in many]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: finished(run, *many))
    assert [len(times(one, "run_started")) for one in many] == [1] * 4


def test_a_run_that_cannot_begin_does_not_stop_the_queue(
    make_run: Callable[..., RunDir], home: Path, until: Any
) -> None:
    broken, good = make_run(crash=True), make_run()
    add_to_queue(broken)
    add_to_queue(good)
    until(lambda: finished(good))
    until(lambda: len(queue_entries(home)) == 1)
    (entry,) = queue_entries(home)
    assert entry.run == broken.name
    assert "no such model: größer" in entry.problem
    assert queue_state(broken, run_status(broken), home) == "failed"
    assert remove_from_queue(broken.name, home)
    assert queue_entries(home) == []


def test_stop_in_every_state(make_run: Callable[..., RunDir], home: Path, until: Any) -> None:
    running, waiting = make_run(steps=1000, step_s=0.02), make_run()
    add_to_queue(running)
    add_to_queue(waiting)
    assert "no longer waits" in end_run(waiting, home)
    assert "nothing to stop" in end_run(waiting, home)
    until(lambda: [e for e in queue_entries(home) if e.pid] or attach(running))
    assert "asked to stop" in end_run(running, home)  # also in the moment before its first event
    until(lambda: run_status(running).state == "stopped")
    assert run_status(waiting).state == "created"
    add_to_queue(running)  # resume
    until(lambda: len(times(running, "run_resumed")) == 1)
    until(lambda: "asked to stop" in end_run(running, home))
    until(lambda: run_status(running).state == "stopped")


def test_a_second_stop_ends_at_once(make_run: Callable[..., RunDir], home: Path, until: Any) -> None:
    run = make_run(steps=10, step_s=30, ignore_term=False)
    add_to_queue(run)
    until(lambda: run_status(run).alive)
    assert "asked to stop" in end_run(run, home)
    assert "ended at once" in end_run(run, home)
    until(lambda: not run_status(run).alive)
    assert queue_entries(home) == []


def test_order_and_refusals(make_run: Callable[..., RunDir], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "ensure_queue_runner", lambda home: False)
    runs = [make_run() for _ in range(3)]
    for run in runs:
        add_to_queue(run)
    names = [run.name for run in runs]

    def order() -> list[int]:
        return [names.index(entry.run) for entry in queue_entries(home)]

    move_in_queue(names[2], -1, home)
    assert order() == [0, 2, 1]
    move_in_queue(names[0], 5, home)
    assert order() == [2, 1, 0]
    with pytest.raises(RunError, match="queue already"):
        add_to_queue(runs[0])
    assert remove_from_queue(names[1], home)
    assert not remove_from_queue(names[1], home)
    with pytest.raises(RunError, match="does not wait"):
        move_in_queue(names[1], 1, home)
    done = create_run("done", json.dumps({"steps": 1}), "", home)
    done.events.write_text('{"v":1,"time":1,"type":"run_finished","step":1}\n')
    with pytest.raises(RunError, match="finished"):
        add_to_queue(done)
    (home / "queue.json").write_text("{")
    with pytest.raises(RunError, match="Delete it"):
        queue_entries(home)
