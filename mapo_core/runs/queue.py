"""Runs that wait for their turn: one at a time per device, in the order of a list that is kept on disk.

A process of its own (`mapo queue run`) starts them, so that they go on when the page that queued them is closed. It
ends when nothing waits or trains any more, and whoever adds a run starts it again. Every run is a detached process, so
the death of the queue's process ends no training; the next one finds the run by its lock and goes on with the list.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ..errors import RunError
from . import launch
from .child import is_locked, try_lock_file
from .disk import write_atomic
from .launch import RunHandle, attach, creation_flags, start_run
from .process import is_same_process
from .reader import reader_of, run_status
from .run_dir import RunDir, list_runs, mapo_home
from .status import RunStatus

_POLL_S = 0.3
_LOCK_S = 20.0
_PROBE_S = 1.0
_SPAWN_S = 30.0  # within which a process that was started for the queue is taken to be on its way
_GPU = "gpu 0"

_spawned: dict[Path, tuple[float, subprocess.Popen[bytes]]] = {}


@dataclass(frozen=True)
class QueueEntry:
    """A run in the queue.

    Attributes:
        run: its name.
        added: when it was added, Unix time in seconds.
        starts: how often it had been started when it was added.
        pid, pid_started: its process, once it is started; the run's own lock tells of it a moment later.
        problem: why it could not be started, if so; it waits for a person then.
    """

    run: str
    added: float
    starts: int = 0
    pid: int | None = None
    pid_started: float | None = None
    problem: str = ""

    @property
    def waiting(self) -> bool:
        """Whether it is still to be started."""
        return self.pid is None and not self.problem


def queue_entries(home: Path | None = None) -> list[QueueEntry]:
    """The queue: what is just being started, then what waits, in order."""
    return _read(_home(home))


def add_to_queue(run: RunDir, *, first: bool = False) -> int:
    """Queue a new or unfinished run, and see to it that somebody starts it.

    Args:
        run: the run; its home folder's queue takes it.
        first: before those that wait, not after them.

    Returns:
        How many runs of its device are before it.

    Raises:
        RunError: it is queued, being trained or finished already, or the queue cannot be written.
    """
    home = run.path.absolute().parents[1]
    with _editing(home) as entries:
        entries[:] = [known for e in entries if (known := _looked_after(home, e)) is not None]
        if any(e.run == run.name and not e.problem for e in entries):
            raise RunError(f"Run {run.name} is in the queue already.")
        state = run_status(run).state
        # After its last word a process needs a moment to end; the queue waits for that.
        if state in ("running", "paused", "stopping") or (state == "created" and is_locked(run)):
            raise RunError(f"Run {run.name} is being trained already.")
        if state == "finished":
            raise RunError(f"Run {run.name} is finished. To train longer, start a new run.")
        entries[:] = [e for e in entries if e.run != run.name]
        entry = QueueEntry(run.name, time.time(), reader_of(run).starts())
        entries.insert(0 if first else len(entries), entry)
        lane = device_lane(run)
        before = entries[: entries.index(entry)]
        ahead = sum(e.waiting and _lane_of(home, e.run) == lane for e in before) + (lane in _busy(home, entries))
    ensure_queue_runner(home)
    return ahead


def remove_from_queue(name: str, home: Path | None = None, *, started: bool = False) -> bool:
    """Take a run that waits out of the queue; its folder stays. False if it was not waiting there.

    Args:
        name: of the run.
        home: whose queue.
        started: also forget a process that was started for it.
    """
    with _editing(_home(home)) as entries:
        kept = [e for e in entries if e.run != name or (e.pid is not None and not started)]
        removed = len(kept) < len(entries)
        entries[:] = kept
        return removed


def move_in_queue(name: str, by: int, home: Path | None = None) -> None:
    """Move a waiting run up (negative) or down by so many places among those that wait.

    Raises:
        RunError: it does not wait.
    """
    with _editing(_home(home)) as entries:
        waiting = [e for e in entries if e.pid is None]
        place = next((i for i, e in enumerate(waiting) if e.run == name), None)
        if place is None:
            raise RunError(f"Run {name} does not wait in the queue any more.")
        entry = waiting.pop(place)
        waiting.insert(max(0, min(len(waiting), place + by)), entry)
        entries[:] = [*(e for e in entries if e.pid is not None), *waiting]


def end_run(run: RunDir, home: Path | None = None) -> str:
    """Take a run out of the queue, ask it to stop and save, or, asked again, end it; says what was done.

    Raises:
        RunError: the request cannot be written, or the process cannot be ended.
    """
    with _editing(_home(home)) as entries:
        own = next((e for e in entries if e.run == run.name), None)
        if own is not None and own.pid is None:
            entries.remove(own)
            return f"Run {run.name} no longer waits in the queue."
        handle = attach(run)
        if handle is None and own is not None and own.pid is not None and is_same_process(own.pid, own.pid_started):
            handle = RunHandle(run, own.pid, own.pid_started)
    if handle is None and not is_locked(run):
        return f"Run {run.name} is not being trained. There is nothing to stop."
    if run.request("stop"):
        return f"Run {run.name} was asked to stop; it saves after the current step. Ask again to end it at once."
    if handle is None:
        return f"Run {run.name} is just starting and was already asked to stop. Ask again in a moment to end it."
    handle.kill()
    remove_from_queue(run.name, home, started=True)
    return f"Run {run.name} was ended at once; resume it to go on from its last checkpoint."


def queue_state(run: RunDir, status: RunStatus, home: Path | None = None) -> str:
    """The run's state, or "waiting" or "starting" where the queue knows better than the run's events."""
    for entry in queue_entries(home):
        if entry.run == run.name and not status.alive:
            if entry.problem:
                return "failed"
            if entry.pid is None:
                return "waiting"
            if is_same_process(entry.pid, entry.pid_started) and status.state != "finished":
                return "starting"
    return status.state


# --- the process that starts them ------------------------------------------------------------------------------------


def ensure_queue_runner(home: Path | None = None) -> bool:
    """Start the queue's process if runs wait and none is there; whether one was started.

    Raises:
        RunError: it cannot be started.
    """
    home = _home(home)
    if not any(entry.waiting for entry in _read(home)) or _is_held(_runner_lock(home)):
        return False
    since, before = _spawned.get(home, (0.0, None))
    if before is not None and before.poll() is None and time.monotonic() - since < _SPAWN_S:
        return False
    log = home / "queue.log"
    try:
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, str(launch.MAIN), "queue", "run"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "MAPO_HOME": str(home), "PYTHONIOENCODING": "utf-8"},
                start_new_session=True,
                creationflags=creation_flags("detached"),
            )
    except OSError as error:
        raise RunError(f"Cannot start the queue with {sys.executable}: {error}.") from error
    _spawned[home] = (time.monotonic(), process)
    launch.reap(process)
    return True


def run_queue(home: Path | None = None, say: Callable[[str], object] = lambda text: None) -> bool:
    """Start the queued runs one after the other, one at a time per device, until none waits or trains.

    Args:
        home: whose queue.
        say: told what happens.

    Returns:
        False if another process does this already.
    """
    home = _home(home)
    home.mkdir(parents=True, exist_ok=True)
    with _runner_lock(home).open("ab") as lock:
        deadline = time.monotonic() + _PROBE_S
        while not try_lock_file(lock.fileno()):  # somebody who only looks holds it for a moment, too
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        started: list[RunHandle] = []
        while True:
            with _editing(home) as entries:
                _start_next(home, entries, started, say)
                # Under the list's lock, so that whoever adds a run later finds this process gone.
                if not any(e.waiting for e in entries) and not any(h.is_alive() for h in started):
                    return True
            time.sleep(_POLL_S)


def _start_next(home: Path, entries: list[QueueEntry], started: list[RunHandle], say: Callable[[str], object]) -> None:
    entries[:] = [known for e in entries if (known := _looked_after(home, e)) is not None]
    if not any(e.waiting for e in entries):
        return
    busy = _busy(home, entries)
    for place, entry in enumerate(entries):
        run = RunDir(home / "runs" / entry.run)
        lane = device_lane(run)
        if not entry.waiting or lane in busy or attach(run) is not None:
            continue
        busy.add(lane)
        try:
            handle = start_run(run, "detached")
        except (RunError, OSError) as error:
            entries[place] = replace(entry, problem=str(error))
            say(f"{entry.run} cannot be started: {error}")
            continue
        started.append(handle)
        entries[place] = replace(entry, pid=handle.pid, pid_started=handle.pid_started)
        say(f"{entry.run} started as process {handle.pid}")


def _looked_after(home: Path, entry: QueueEntry) -> QueueEntry | None:
    """The entry as it stands now; None once the run is gone, or was started and its events tell the rest."""
    run = RunDir(home / "runs" / entry.run)
    if not run.config.is_file():
        return None
    if entry.problem:
        return entry
    alive = entry.pid is not None and is_same_process(entry.pid, entry.pid_started)
    if reader_of(run).starts() > entry.starts:
        return None
    if entry.pid is None or alive:
        return entry
    words = f"Its process ended before it began. {run.log} ends with: {launch.last_line(run.log)}"
    return replace(entry, pid=None, pid_started=None, problem=words)


def device_lane(run: RunDir) -> str:
    """Which runs must not train at the same time: those of one GPU. What "auto" means is taken to be the first GPU."""
    try:
        device = json.loads(run.config.read_text(encoding="utf-8"))["training"]["device"]
    except (OSError, ValueError, KeyError, TypeError):
        device = "auto"
    name = str(device)
    return _GPU if name in ("auto", "cuda", "cuda:0", "mps") else name


def _lane_of(home: Path, name: str) -> str:
    return device_lane(RunDir(home / "runs" / name))


def _busy(home: Path, entries: list[QueueEntry]) -> set[str]:
    """The lanes that are taken: by runs that hold their lock, and by those that are just starting."""
    starting = {e.run for e in entries if e.pid is not None and is_same_process(e.pid, e.pid_started)}
    return {device_lane(run) for run in list_runs(home) if run.name in starting or is_locked(run)}


# --- the list on disk ------------------------------------------------------------------------------------------------


def _home(home: Path | None) -> Path:
    return (mapo_home() if home is None else home).absolute()


def _runner_lock(home: Path) -> Path:
    return home / "queue-runner.lock"


def _read(home: Path) -> list[QueueEntry]:
    try:
        found = json.loads((home / "queue.json").read_text(encoding="utf-8"))
        return [QueueEntry(**entry) for entry in found["entries"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"The queue {home / 'queue.json'} cannot be read: {error}. Delete it to begin anew.") from error


@contextlib.contextmanager
def _editing(home: Path) -> Iterator[list[QueueEntry]]:
    """The list, to be changed in place by one process at a time; it is written when the block ends well."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "queue.lock").open("ab") as lock:
        deadline = time.monotonic() + _LOCK_S
        while not try_lock_file(lock.fileno()):
            if time.monotonic() > deadline:
                raise RunError(f"The queue is being changed by another process for too long ({home}). Try again.")
            time.sleep(0.02)
        entries = _read(home)
        before = list(entries)
        yield entries
        if entries != before:
            write_atomic(home / "queue.json", json.dumps({"entries": [asdict(e) for e in entries]}, indent=1) + "\n")


def _is_held(lock: Path) -> bool:
    if not lock.exists():
        return False
    with lock.open("ab") as file:
        return not try_lock_file(file.fileno())
