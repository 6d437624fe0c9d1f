"""The events of a run: one JSON line each, appended by the trainer, followed by everyone else."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

from .disk import fault_point, faults_armed
from .process import is_same_process, process_start_time
from .run_dir import RunDir

VERSION = 1

EventType = Literal[
    "run_started",
    "run_resumed",
    "phase",
    "step",
    "evaluated",
    "sample_saved",
    "checkpoint_saved",
    "rolled_back",
    "memory_step_down",
    "paused",
    "warning",
    "run_finished",
    "run_stopped",
    "run_failed",
]
EVENT_TYPES: tuple[EventType, ...] = get_args(EventType)
Event = dict[str, Any]

State = Literal["created", "running", "paused", "stopping", "finished", "stopped", "failed", "interrupted"]

_STARTS = ("run_started", "run_resumed")
_GOES_BACK = (*_STARTS, "rolled_back")
_SUPERSEDED = ("step", "evaluated", "sample_saved", "checkpoint_saved", "warning")
_ENDS: dict[str, State] = {"run_finished": "finished", "run_stopped": "stopped", "run_failed": "failed"}
_ENVELOPE = ("v", "time", "type", "step")
_BLOCK_BYTES = 64 * 1024


class EventWriter:
    """Appends events to a run; safe to use from several threads of the one process that holds the run's lock."""

    def __init__(self, run: RunDir) -> None:
        """Open the events, and remove the partial last line that a killed process may have left."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._lock = threading.Lock()
        fault_point("events.jsonl:opening")
        self._file: int | None = os.open(run.events, flags, 0o666)
        fault_point("events.jsonl:opened")
        self._drop_partial_line(self._file)

    def __enter__(self) -> Self:
        """Write while a `with` block runs."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Close the file; later events are errors."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
            self._file = None

    def emit(self, type: EventType, step: int | None = None, **fields: Any) -> Event:
        """Append one event.

        Numbers that are not finite become null, and the event gets `"nonfinite": true`, because JSON has no NaN.
        `run_started` and `run_resumed` get this process's `pid` and `pid_started`.

        Args:
            type: one of EVENT_TYPES.
            step: optimizer steps done so far; for `run_resumed` and `rolled_back` the step that is gone back to.
            fields: anything that JSON can hold.

        Returns:
            The event as written.

        Raises:
            ValueError: the type is unknown, a field is called `v` or `time`, or the writer is closed.
            TypeError: JSON cannot hold a field, for example a tensor.
            OSError: the disk refuses; nothing of the event stays in the file.
        """
        if type not in EVENT_TYPES:
            raise ValueError(f"{type!r} is not an event type; there are {', '.join(EVENT_TYPES)}")
        if reserved := {"v", "time"} & fields.keys():
            raise ValueError(f"An event's {' and '.join(sorted(reserved))} cannot be given as a field")
        if type in _STARTS:
            fields = {"pid": os.getpid(), "pid_started": process_start_time(os.getpid()), **fields}
        with self._lock:
            event: Event = {"v": VERSION, "time": time.time(), "type": type, "step": step, **fields}
            try:
                line = json.dumps(event, allow_nan=False)
            except ValueError:
                event = {**nulls_for_nonfinite(event), "nonfinite": True}
                line = json.dumps(event, allow_nan=False)
            self._append(line.encode("ascii") + b"\n")
        return event

    def _append(self, line: bytes) -> None:
        if self._file is None:
            raise ValueError("The event writer is closed")
        fault_point("events.jsonl:start")
        if faults_armed():
            half = len(line) // 2
            os.write(self._file, line[:half])
            fault_point("events.jsonl:half")
            line = line[half:]
        try:
            # A single write, unless the disk is nearly full or a signal comes between.
            while line:
                line = line[os.write(self._file, line) :]
        except OSError:
            self._drop_partial_line(self._file)
            raise
        fault_point("events.jsonl:written")

    def _drop_partial_line(self, file: int) -> None:
        """Cut the file after its last newline."""
        end = size = os.lseek(file, 0, os.SEEK_END)
        while end > 0:
            begin = max(0, end - _BLOCK_BYTES)
            os.lseek(file, begin, os.SEEK_SET)
            newline = os.read(file, end - begin).rfind(b"\n")
            if newline >= 0:
                end = begin + newline + 1
                break
            end = begin
        if end < size:
            fault_point("events.jsonl:repairing")
            os.ftruncate(file, end)
            fault_point("events.jsonl:repaired")


class EventTail:
    """Follows an events file from its beginning.

    It gives the lines as they come: after a resume or rollback `drop_superseded` says which of them still count.
    """

    def __init__(self, path: Path) -> None:
        """Follow the file at `path`, which need not exist yet."""
        self._path = path
        self._offset = 0

    def poll(self) -> list[Event]:
        """The events that were completed since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete, newline, _ = data.rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        return [event for event in map(_parse, complete.split(b"\n")) if event is not None]


def read_events(path: Path) -> list[Event]:
    """The events that count, in order; a partial last line and unreadable lines are ignored."""
    return drop_superseded(EventTail(path).poll())


def drop_superseded(events: Iterable[Event]) -> list[Event]:
    """Leave out what a later resume or rollback has undone: steps, measurements, samples and checkpoints above it."""
    kept: list[Event] = []
    for event in events:
        if event["type"] in _GOES_BACK:
            back_to = event.get("step") or 0
            kept = [e for e in kept if e["type"] not in _SUPERSEDED or (e.get("step") or 0) <= back_to]
        kept.append(event)
    return kept


@dataclass(frozen=True)
class RunStatus:
    """Where a run stands."""

    state: State
    """"interrupted": the process ended without an event that says so."""
    step: int = 0
    """Optimizer steps done."""
    steps: int | None = None
    """Steps to do, as the last event with a field `steps` said."""
    message: str = ""
    """What it is doing, or why it ended."""
    pid: int | None = None
    """Process that trains or trained it."""
    alive: bool = False
    """Whether that process runs."""
    last_event_time: float | None = None
    """Unix time of the last event, seconds."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Fields of the last step event."""


def run_status(run: RunDir) -> RunStatus:
    """The status of a run, from its events and its process and nothing else."""
    while True:
        process = last_process(events := read_events(run.events))
        if process is None or is_same_process(*process):
            return _status(events, process[0] if process else None, alive=process is not None)
        # Read again now that it is known to be gone: its last words may have come in between.
        if last_process(events := read_events(run.events)) == process:
            return _status(events, process[0], alive=False)


def last_process(events: Iterable[Event]) -> tuple[int, float | None] | None:
    """Id and start time of the process that last took the run up, or None if none ever did."""
    last = None
    for event in events:
        if event["type"] in _STARTS and isinstance(event.get("pid"), int):
            last = (event["pid"], event.get("pid_started"))
    return last


def _status(events: list[Event], pid: int | None, alive: bool) -> RunStatus:
    state: State = "created"
    step, steps, message, metrics = 0, None, "", {}
    for event in events:
        kind = event["type"]
        state = _next_state(state, event)
        step = (event.get("step") or 0) if kind in _GOES_BACK else event.get("step") or step
        steps = event.get("steps", steps)
        if kind == "step":
            metrics = {name: value for name, value in event.items() if name not in _ENVELOPE}
        elif kind in _STARTS or kind in _ENDS or kind in ("phase", "paused"):
            message = event.get("message") or event.get("phase") or ""
    if not alive and state in ("running", "paused", "stopping"):
        state = "interrupted"
        message = f"The process ended at step {step} without a word: it was killed, or it crashed."
    last_event_time = events[-1]["time"] if events else None
    return RunStatus(state, step, steps, message, pid, alive, last_event_time, metrics)


def _next_state(state: State, event: Event) -> State:
    kind = event["type"]
    if kind in _ENDS:
        return _ENDS[kind]
    if kind in _STARTS:
        return "running"
    # A stop is not taken back: whatever the trainer does after it belongs to the stopping.
    if state == "stopping" or (kind == "phase" and event.get("phase") == "stopping"):
        return "stopping"
    if kind == "paused":
        return "paused"
    return "running" if kind in ("phase", "step") else state


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    known = isinstance(event, dict) and event.get("type") in EVENT_TYPES and isinstance(event.get("time"), float | int)
    return event if known else None


def nulls_for_nonfinite(value: Any) -> Any:
    """The same with null where a number is not finite, which JSON cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: nulls_for_nonfinite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [nulls_for_nonfinite(inner) for inner in value]
    return value
