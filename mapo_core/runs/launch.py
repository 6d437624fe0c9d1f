"""The face's side of a run: start its process, follow it, stop it, and find it again."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Literal

from ..errors import RunError
from .child import is_locked
from .process import is_same_process, process_start_time
from .reader import reader_of, run_status
from .run_dir import RunDir
from .status import RunStatus

Lifetime = Literal["tied", "detached"]

MAIN = Path(__file__).resolve().parents[1] / "__main__.py"

_TERM_GRACE_S = 5.0
_POLL_S = 0.05

_starting = threading.Lock()
_children: dict[Path, subprocess.Popen[bytes]] = {}


class RunHandle:
    """A run's process, as started here (`start_run`) or found again (`attach`)."""

    def __init__(
        self,
        run: RunDir,
        pid: int,
        pid_started: float | None,
        process: subprocess.Popen[bytes] | None = None,
        starts_before: int = 0,
    ) -> None:
        """Use `start_run` or `attach`.

        Args:
            run: the run.
            pid: the process's id.
            pid_started: its start time, by `process_start_time`.
            process: our child, if it is one.
            starts_before: how many starts and resumes the events told of before this one.
        """
        self.run = run
        self.pid = pid
        self.pid_started = pid_started
        self._process = process
        self._starts_before = starts_before

    def is_alive(self) -> bool:
        """Whether the process runs."""
        if self._process is not None:
            return self._process.poll() is None
        return is_same_process(self.pid, self.pid_started)

    def status(self) -> RunStatus:
        """The run's status; "failed" also when the process ended before it could write any event."""
        alive = self.is_alive()
        status = run_status(self.run)
        if self._process is None or alive or reader_of(self.run).starts() > self._starts_before:
            return status
        message = (
            f"The training process ended with code {self._process.returncode} before it began. "
            f"{self.run.log} ends with: {last_line(self.run.log)}"
        )
        return dataclasses.replace(status, state="failed", message=message, pid=self.pid, alive=False)

    def request(self, verb: str) -> bool:
        """Ask for stop, pause, resume, save or sample; see `RunDir.request`."""
        return self.run.request(verb)

    def stop(self, timeout_s: float | None = None) -> RunStatus:
        """Request a stop; if one is already waiting for its answer, kill the process.

        Args:
            timeout_s: how long to wait for the end, seconds; None does not wait. It does not kill when time is up.
        """
        if self.is_alive() and not self.run.request("stop"):
            self.kill()
        return self.status() if timeout_s is None else self.wait(timeout_s)

    def kill(self) -> None:
        """End the process and its helpers without saving: first politely, five seconds later by force.

        Raises:
            RunError: the system does not let us, for example because it is another user's process.
        """
        for force in (False, True):
            if self.is_alive():
                try:
                    _end_process(self.pid, force)
                except ProcessLookupError:
                    pass
                except PermissionError as error:
                    raise RunError(f"Cannot end process {self.pid} of run {self.run.name}: {error}.") from error
                self._wait_for_end(_TERM_GRACE_S)
        self.run.answer("stop")

    def wait(self, timeout_s: float | None = None) -> RunStatus:
        """Wait until the process has ended, at most `timeout_s` seconds, and say where the run stands then."""
        self._wait_for_end(timeout_s)
        return self.status()

    def close(self) -> None:
        """Let go of the process: a tied one ends, a detached one goes on."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def _wait_for_end(self, timeout_s: float | None) -> None:
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
            return
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self.is_alive() and (deadline is None or time.monotonic() < deadline):
            time.sleep(_POLL_S)


def start_run(
    run: RunDir, lifetime: Lifetime = "tied", python: str | None = None, env: dict[str, str] | None = None
) -> RunHandle:
    """Start the training process of a run, new or resumed. What it prints is appended to `train.log`.

    Args:
        run: the run.
        lifetime: "tied" ends with this process, also when this one is killed; "detached" survives it.
        python: the interpreter; None is this one.
        env: variables on top of this process's own.

    Raises:
        RunError: the run is being trained already, or the process cannot be started.
    """
    with _starting:
        if attach(run) is not None or is_locked(run):
            raise RunError(
                f"Run {run.name} is being trained already. Follow it, or stop it with `mapo stop {run.name}`."
            )
        # Nobody is there whom these could have been meant for.
        for verb in run.pending():
            run.answer(verb)
        starts_before = reader_of(run).starts()
        process = _spawn(run, lifetime, python or sys.executable, env or {})
        _children[run.path.absolute()] = process
    pid_started = process_start_time(process.pid)
    # The thread keeps the process's pipe open when the handle is dropped, and takes its end, so no zombie stays.
    threading.Thread(target=_reap, args=(run, process), name="mapo-reaper", daemon=True).start()
    return RunHandle(run, process.pid, pid_started, process, starts_before)


def attach(run: RunDir) -> RunHandle | None:
    """Find the living process of a run, or None: by the id and start time in its events, or as started from here."""
    process = reader_of(run).process()
    if process is not None and is_same_process(*process):
        return RunHandle(run, *process)
    child = _children.get(run.path.absolute())
    if child is not None and child.poll() is None:
        return RunHandle(run, child.pid, process_start_time(child.pid))
    return None


def stop_run(run: RunDir) -> str:
    """Ask a run to stop, or kill it if it has been asked before; says what was done.

    Raises:
        RunError: the request cannot be written, or the process cannot be ended.
    """
    handle = attach(run)
    if handle is None and not is_locked(run):
        return f"Run {run.name} is not being trained: {run_status(run).state}. There is nothing to stop."
    if run.request("stop"):
        return f"Run {run.name} was asked to stop; it saves after the current step. Ask again to end it at once."
    if handle is None:
        return f"Run {run.name} is just starting and was already asked to stop. Ask again in a moment to end it."
    handle.kill()
    return f"Run {run.name} was ended at once; `mapo resume {run.name}` goes on from its last checkpoint."


def _spawn(run: RunDir, lifetime: Lifetime, python: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
    # ComfyUI's Windows build starts Python with -s, so the child must not see the user's own packages either.
    inherited = {"PYTHONNOUSERSITE": "1"} if sys.flags.no_user_site else {}
    try:
        with run.log.open("ab") as log:
            return subprocess.Popen(
                [python, str(MAIN), "train", str(run.path.absolute()), "--lifetime", lifetime],
                stdin=subprocess.PIPE if lifetime == "tied" else subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONIOENCODING": "utf-8", **inherited, **env},
                # A session of its own: Ctrl-C in a terminal then reaches only the face, which asks for a stop.
                start_new_session=True,
                creationflags=creation_flags(lifetime),
            )
    except OSError as error:
        raise RunError(f"Cannot start the training process of run {run.name} with {python}: {error}.") from error


def creation_flags(lifetime: Lifetime) -> int:
    """How Windows is to start a child: without a console window, and out of reach of the parent's Ctrl-C."""
    if sys.platform == "win32":
        console = subprocess.CREATE_NO_WINDOW if lifetime == "tied" else subprocess.DETACHED_PROCESS
        return subprocess.CREATE_NEW_PROCESS_GROUP | console
    return 0


def reap(process: subprocess.Popen[bytes]) -> None:
    """Take the end of a process whenever it comes, so that no zombie stays."""
    threading.Thread(target=process.wait, name="mapo-reaper", daemon=True).start()


def _reap(run: RunDir, process: subprocess.Popen[bytes]) -> None:
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
    with _starting:
        if _children.get(run.path.absolute()) is process:
            del _children[run.path.absolute()]


def _end_process(pid: int, force: bool) -> None:
    if sys.platform == "win32":
        os.kill(pid, signal.SIGTERM)  # TerminateProcess, by force in any case
    elif os.getpgid(pid) == pid:
        os.killpg(pid, signal.SIGKILL if force else signal.SIGTERM)
    else:
        os.kill(pid, signal.SIGKILL if force else signal.SIGTERM)


def last_line(log: Path) -> str:
    """The last words of a log."""
    if not log.exists():
        return "nothing"
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode("utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
