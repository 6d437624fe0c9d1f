"""Processes: tied and detached, found again, stopped, killed, and never two in one folder."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mapo_core.errors import RunError
from mapo_core.runs import (
    RunDir,
    acquire_run_lock,
    attach,
    is_locked,
    launch,
    process_start_time,
    read_events,
    run_status,
    start_run,
    stop_run,
)

REPOSITORY = Path(__file__).resolve().parents[2]
STAND_IN = Path(__file__).with_name("stand_in.py")
LONG = {"steps": 1000, "step_s": 60}
SHORT = {"steps": 100_000, "step_s": 0.01}

MakeRun = Callable[..., RunDir]
Until = Callable[[Callable[[], object]], None]

PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from mapo_core.runs import launch, open_run
launch.MAIN = Path(sys.argv[2])
handle = launch.start_run(open_run(sys.argv[3]), sys.argv[4])
sys.stdin.read()
"""


def parent_of(run: RunDir, lifetime: str) -> subprocess.Popen[bytes]:
    """Another process that starts the run; it lives until its standard input closes."""
    command = [sys.executable, "-c", PARENT, str(REPOSITORY), str(STAND_IN), str(run.path), lifetime]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def kill_parent(parent: subprocess.Popen[bytes]) -> None:
    parent.kill()
    parent.communicate()


def seen(run: RunDir, kind: str) -> bool:
    return any(event["type"] == kind for event in read_events(run.events))


class TestStart:
    def test_runs_to_its_end(self, make_run: MakeRun) -> None:
        run = make_run(steps=3)
        handle = start_run(run)
        status = handle.wait(60)
        assert (status.state, status.step, status.steps, status.alive) == ("finished", 3, 3, False)
        assert not handle.is_alive()
        assert attach(run) is None

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no zombies")
    def test_leaves_no_zombie_and_no_pipe(self, make_run: MakeRun, until: Until) -> None:
        handle = start_run(make_run())
        until(lambda: not any(thread.name == "mapo-reaper" for thread in threading.enumerate()))
        with pytest.raises(ProcessLookupError):
            os.kill(handle.pid, 0)
        assert handle._process is not None
        assert handle._process.stdin is not None
        assert handle._process.stdin.closed
        assert launch._children == {}

    def test_a_failure_before_the_first_event_is_told(self, make_run: MakeRun) -> None:
        run = make_run(crash=True)
        status = start_run(run).wait(60)
        assert (status.state, status.alive) == ("failed", False)
        assert "code 1" in status.message
        assert "RuntimeError: no such model: größer" in status.message
        assert "Traceback" in run.log.read_text(encoding="utf-8")

    def test_a_failure_at_resume_is_told_too(self, make_run: MakeRun) -> None:
        run = make_run(steps=2)
        start_run(run).wait(60)
        run.config.write_text('{"crash": true}')
        assert start_run(run).wait(60).state == "failed"
        assert run_status(run).state == "finished"

    def test_no_interpreter(self, make_run: MakeRun) -> None:
        with pytest.raises(RunError, match="no-such-python"):
            start_run(make_run(), python="/no-such-python")

    def test_the_variables_reach_the_child(self, make_run: MakeRun) -> None:
        run = make_run()
        points = run.path / "points.txt"
        start_run(run, env={"MAPO_FAULT": f"list:{points}"}).wait(60)
        assert "events.jsonl:half" in points.read_text()

    def test_old_requests_are_not_for_the_new_process(self, make_run: MakeRun) -> None:
        run = make_run()
        run.request("stop")
        assert start_run(run).wait(60).state == "finished"

    @pytest.mark.skipif(os.name == "nt", reason="process groups of POSIX")
    def test_ctrl_c_in_the_terminal_does_not_reach_it(self, make_run: MakeRun) -> None:
        handle = start_run(make_run(**LONG))
        assert os.getpgid(handle.pid) != os.getpgrp()
        handle.kill()


class TestOnlyOne:
    def test_a_living_run_is_not_started_again(self, make_run: MakeRun, until: Until) -> None:
        run = make_run(**LONG)
        handle = start_run(run)
        with pytest.raises(RunError, match="being trained already"):
            start_run(run)
        until(lambda: seen(run, "run_started"))
        with pytest.raises(RunError, match="being trained already"):
            start_run(run)
        handle.kill()

    def test_a_race_of_starters_has_one_winner(self, make_run: MakeRun) -> None:
        run = make_run(**LONG)
        barrier = threading.Barrier(4)

        def start(_: int) -> object:
            barrier.wait()
            try:
                return start_run(run)
            except RunError:
                return None

        with ThreadPoolExecutor(4) as pool:
            handles = [handle for handle in pool.map(start, range(4)) if handle is not None]
        assert len(handles) == 1

    def test_the_second_trainer_is_refused(self, make_run: MakeRun) -> None:
        run = make_run()
        with acquire_run_lock(run):
            command = [sys.executable, str(STAND_IN), "train", str(run.path), "--lifetime", "detached"]
            second = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
            assert second.returncode == 1
            assert "is being trained by another process" in second.stderr
            with pytest.raises(RunError, match="being trained already"):
                start_run(run)
        assert not run.events.exists()

    def test_a_killed_trainer_gives_the_lock_back(self, make_run: MakeRun, until: Until) -> None:
        run = make_run(**LONG)
        handle = start_run(run)
        until(lambda: seen(run, "run_started"))
        assert is_locked(run)
        handle.kill()
        assert handle.wait(60).state == "interrupted"
        assert not is_locked(run)


class TestLifetime:
    def test_tied_ends_when_its_parent_is_killed(self, make_run: MakeRun, until: Until) -> None:
        run = make_run(**LONG)
        parent = parent_of(run, "tied")
        until(lambda: seen(run, "run_started"))
        assert run_status(run).alive
        kill_parent(parent)
        until(lambda: not run_status(run).alive)
        assert run_status(run).state == "interrupted"

    def test_tied_outlives_its_handle(self, make_run: MakeRun) -> None:
        run = make_run(steps=150, step_s=0.02)
        start_run(run)
        gc.collect()
        handle = attach(run)
        assert handle is not None
        assert handle.wait(60).state == "finished"

    def test_tied_ends_when_it_is_let_go(self, make_run: MakeRun, until: Until) -> None:
        run = make_run(**LONG)
        handle = start_run(run)
        until(lambda: seen(run, "run_started"))
        handle.close()
        assert handle.wait(60).state == "interrupted"
        assert not handle.is_alive()

    def test_detached_survives_and_is_found_again(self, make_run: MakeRun, until: Until) -> None:
        run = make_run(**SHORT)
        parent = parent_of(run, "detached")
        until(lambda: seen(run, "step"))
        kill_parent(parent)
        step = run_status(run).step
        until(lambda: run_status(run).step > step + 5)
        handle = attach(run)
        assert handle is not None
        assert handle.pid == run_status(run).pid != os.getpid()
        assert handle.pid_started == process_start_time(handle.pid)
        handle.close()
        assert handle.is_alive()
        assert handle.stop(timeout_s=60).state == "stopped"
        assert not handle.is_alive()
        assert attach(run) is None


class TestStop:
    def test_is_acknowledged_within_a_second_during_a_long_step(self, make_run: MakeRun, until: Until) -> None:
        run = make_run(**LONG)
        handle = start_run(run)
        until(lambda: seen(run, "run_started"))
        asked = time.time()
        assert handle.stop().state in ("running", "stopping")
        until(lambda: run_status(run).state == "stopping")
        assert read_events(run.events)[-1]["time"] - asked < 1
        handle.kill()

    def test_ends_after_the_step_and_goes_on_later(self, make_run: MakeRun, until: Until) -> None:
        run = make_run(**SHORT)
        handle = start_run(run)
        until(lambda: seen(run, "step"))
        stopped = handle.stop(timeout_s=60)
        assert (stopped.state, stopped.alive) == ("stopped", False)
        assert run.latest_checkpoint() == run.checkpoint_path(stopped.step)
        assert run.pending() == []
        again = start_run(run)
        until(lambda: run_status(run).step > stopped.step)
        again.stop(timeout_s=60)
        steps = [event["step"] for event in read_events(run.events) if event["type"] == "step"]
        assert steps == list(range(1, len(steps) + 1))

    def test_the_second_request_kills(self, make_run: MakeRun, until: Until) -> None:
        run = make_run(**LONG)
        handle = start_run(run)
        until(lambda: seen(run, "run_started"))
        assert "asked to stop" in stop_run(run)
        assert handle.is_alive()
        assert "ended at once" in stop_run(run)
        assert handle.wait(60).state == "interrupted"
        assert "not being trained: interrupted" in stop_run(run)

    def test_the_second_stop_of_a_handle_kills(self, make_run: MakeRun, until: Until) -> None:
        handle = start_run(make_run(**LONG))
        until(lambda: seen(handle.run, "run_started"))
        handle.stop()
        assert handle.is_alive()
        assert handle.stop(timeout_s=60).state == "interrupted"
        assert not handle.is_alive()
        handle.stop()
        assert handle.run.pending() == []

    @pytest.mark.skipif(os.name == "nt", reason="Windows ends processes by force only")
    def test_force_follows_when_asking_does_not_help(
        self, make_run: MakeRun, until: Until, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launch, "_TERM_GRACE_S", 0.2)
        run = make_run(**LONG, ignore_term=True)
        handle = start_run(run)
        until(lambda: seen(run, "run_started"))
        found = attach(run)
        assert found is not None
        found.kill()
        assert not found.is_alive()
        assert handle._process is not None
        handle.wait(60)
        assert handle._process.returncode == -signal.SIGKILL

    def test_nothing_to_stop(self, run: RunDir) -> None:
        assert "not being trained: created" in stop_run(run)
        assert run.pending() == []

    def test_a_run_that_holds_its_lock_but_told_nothing_yet(self, run: RunDir) -> None:
        with acquire_run_lock(run):
            assert "asked to stop" in stop_run(run)
            assert "just starting" in stop_run(run)

    def test_a_paused_run_tells_so_and_goes_on(self, make_run: MakeRun, until: Until) -> None:
        run = make_run(**SHORT)
        handle = start_run(run)
        until(lambda: seen(run, "step"))
        handle.request("pause")
        until(lambda: run_status(run).state == "paused")
        until(lambda: run.pending() == [])
        paused_at = run_status(run).step
        handle.request("resume")
        until(lambda: run_status(run).step > paused_at)
        assert handle.stop(timeout_s=60).state == "stopped"
