"""The trainer's side of a run: one trainer per folder, the end of its parent, and the requests made to it."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from ..errors import RunError
from .run_dir import RunDir

_POLL_S = 0.1


@contextlib.contextmanager
def acquire_run_lock(run: RunDir, wait_s: float = 1.0) -> Iterator[None]:
    """Be the only trainer of a run while the block runs. The system gives the lock back however the process ends.

    Args:
        run: the run.
        wait_s: how long to wait for a trainer that is just ending, seconds.

    Raises:
        RunError: another process trains the run, or the folder's file system has no locks.
    """
    descriptor = os.open(run.lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + wait_s
        while not _try_lock(descriptor, run):
            if time.monotonic() >= deadline:
                raise RunError(
                    f"Run {run.name} is being trained by another process. Follow or stop that one; two cannot train "
                    f"in one folder ({run.path})."
                )
            time.sleep(0.02)
        try:
            yield
        finally:
            _unlock(descriptor)
    finally:
        os.close(descriptor)


def is_locked(run: RunDir) -> bool:
    """Whether a trainer holds the run; also true before its first event."""
    if not run.lock.exists():
        return False
    descriptor = os.open(run.lock, os.O_RDWR)
    try:
        if not _try_lock(descriptor, run):
            return True
        _unlock(descriptor)
        return False
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, run: RunDir) -> bool:
    try:
        return try_lock_file(descriptor)
    except OSError as error:
        raise RunError(f"Cannot lock {run.lock}: {error}. Put MAPO_HOME on a local disk.") from error


def try_lock_file(descriptor: int) -> bool:
    """Take the lock of an open file if nobody has it; the system gives it back when the file is closed.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _unlock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_UNLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)


def watch_parent(on_parent_gone: Callable[[], object]) -> None:
    """Call back, from a thread, when the parent has closed our standard input or is gone.

    Standard input reads as empty afterwards.
    """
    # The pipe is read through a copy of its own. A thread blocked in sys.stdin would make the interpreter abort at
    # its end, and on Windows would block every library that asks what standard input is.
    pipe = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)

    def wait() -> None:
        while os.read(pipe, 1024):
            pass
        on_parent_gone()

    threading.Thread(target=wait, name="mapo-parent", daemon=True).start()


class RequestWatcher:
    """Sees the requests made to the trainer within a tenth of a second, also while a long step runs.

    - stop: `stop_requested` is set and stays set. The file stays until `run.answer("stop")` after `run_stopped`, so
      that a second request is recognised as one.
    - pause and resume: `pause_requested` is set and cleared. The trainer pauses between steps: it emits `paused`,
      answers "pause", and waits for the event to clear or for a stop. "resume" is answered here.
    - save, sample: `take(verb)` is true once per request; `run.answer(verb)` follows the event that answers.
    """

    def __init__(self, run: RunDir, on_stop_seen: Callable[[], object] | None = None) -> None:
        """Start watching.

        Args:
            run: the run.
            on_stop_seen: called once, from the watching thread, right after `stop_requested` is set.
        """
        self.stop_requested = threading.Event()
        self.pause_requested = threading.Event()
        self._run = run
        self._on_stop_seen = on_stop_seen
        self._taken: dict[str, tuple[int, int]] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mapo-requests", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Watch while a `with` block runs."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Stop watching, and delete what is left of the requests: nobody will answer them."""
        self._closing.set()
        self._thread.join()
        for verb in self._run.pending():
            self._run.answer(verb)

    def take(self, verb: str) -> bool:
        """Whether this was requested and not taken yet."""
        try:
            found = (self._run.requests / verb).stat()
        except FileNotFoundError:
            return False
        # The file stays until it is answered; a later request is another file.
        identity = (found.st_ino, found.st_mtime_ns)
        if self._taken.get(verb) == identity:
            return False
        self._taken[verb] = identity
        return True

    def _watch(self) -> None:
        while True:
            if not self.stop_requested.is_set() and self._run.is_pending("stop"):
                self.stop_requested.set()
                if self._on_stop_seen is not None:
                    self._on_stop_seen()
            if self._run.is_pending("resume"):
                self.pause_requested.clear()
                self._run.answer("resume")
            elif self._run.is_pending("pause"):
                self.pause_requested.set()
            if self._closing.wait(_POLL_S):
                return
