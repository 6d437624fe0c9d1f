"""The trainer's side: requests, the lock, and telling processes apart."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from mapo_core.errors import RunError
from mapo_core.runs import EventWriter, RequestWatcher, RunDir, acquire_run_lock, is_locked, process_start_time

Until = Callable[[Callable[[], object]], None]


class TestWatcher:
    def test_stop_is_seen_once_and_stays(self, run: RunDir, until: Until) -> None:
        calls: list[str] = []
        with EventWriter(run) as events:

            def on_stop() -> None:
                calls.append(events.emit("phase", 3, phase="stopping")["phase"])

            with RequestWatcher(run, on_stop) as watcher:
                assert not watcher.stop_requested.is_set()
                run.request("stop")
                assert watcher.stop_requested.wait(60)
                until(lambda: calls)
                run.request("pause")
                assert watcher.pause_requested.wait(60)
                assert run.is_pending("stop")
        assert calls == ["stopping"]
        assert run.pending() == []

    def test_pause_and_resume(self, run: RunDir, until: Until) -> None:
        with RequestWatcher(run) as watcher:
            run.request("pause")
            assert watcher.pause_requested.wait(60)
            run.answer("pause")
            run.request("resume")
            until(lambda: not watcher.pause_requested.is_set())
            until(lambda: run.pending() == [])

    def test_each_request_is_taken_once(self, run: RunDir) -> None:
        with RequestWatcher(run) as watcher:
            assert not watcher.take("save")
            run.request("save")
            assert watcher.take("save")
            assert not watcher.take("save")
            assert not watcher.take("sample")
            run.answer("save")
            run.request("save")
            assert watcher.take("save")


class TestProcess:
    def test_the_start_time_is_stable_and_tells_processes_apart(self) -> None:
        mine = process_start_time(os.getpid())
        assert mine is not None
        assert process_start_time(os.getpid()) == mine
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert (process_start_time(child.pid) or 0) > mine
        child.kill()
        child.communicate()
        assert process_start_time(child.pid) is None
        assert process_start_time(0) is None
        assert process_start_time(-1) is None

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no zombies")
    def test_a_zombie_does_not_run(self) -> None:
        child = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert process_start_time(child.pid) is None
        child.wait()


class TestLock:
    def test_is_held_by_one(self, run: RunDir) -> None:
        assert not is_locked(run)
        with acquire_run_lock(run):
            assert is_locked(run)
            with pytest.raises(RunError, match="another process"), acquire_run_lock(run, wait_s=0):
                pass
            assert is_locked(run)
        assert not is_locked(run)

    def test_the_lock_waits_for_a_trainer_that_is_ending(self, run: RunDir) -> None:
        ending = threading.Event()

        def hold() -> None:
            with acquire_run_lock(run):
                held.set()
                ending.wait()

        held = threading.Event()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        threading.Timer(0.1, ending.set).start()
        with acquire_run_lock(run, wait_s=60):
            assert ending.is_set()
        thread.join()
