"""The events of a run: one JSON line each, appended by the trainer, followed by everyone else."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, get_args

from .disk import fault_point, faults_armed
from .process import process_start_time
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

STARTS = ("run_started", "run_resumed")
GOES_BACK = (*STARTS, "rolled_back")
SUPERSEDED = ("step", "evaluated", "sample_saved", "checkpoint_saved", "warning")
_BLOCK_BYTES = 64 * 1024
_READ_BYTES = 1024 * 1024
_MARK_BYTES = 1024


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
        if type in STARTS:
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
        end = last_line_end(file)
        if end < os.lseek(file, 0, os.SEEK_END):
            fault_point("events.jsonl:repairing")
            os.ftruncate(file, end)
            fault_point("events.jsonl:repaired")


@dataclass(frozen=True)
class LineBlock:
    """Whole lines that were added to a file.

    Attributes:
        offset: where they begin, bytes.
        data: the lines, each with its newline.
        restarted: the file is not the one that was read before (cut, replaced or deleted); what came from it is void.
    """

    offset: int
    data: bytes
    restarted: bool


class LineCursor:
    """How far a growing file of lines has been read; a partial last line waits until it is whole."""

    def __init__(self, path: Path) -> None:
        """Read the file at `path`, which need not exist yet, from its beginning."""
        self._path = path
        self._offset = 0
        self._mark = b""  # the last bytes that were read, by which another file under the same name is noticed

    def next_block(self) -> LineBlock | None:
        """The next whole lines, about a megabyte of them at most, or None where there is nothing new."""
        try:
            with self._path.open("rb") as file:
                restarted = not self._is_the_same(file)
                if restarted:
                    self._offset, self._mark = 0, b""
                begin, data = self._offset, _read_lines(file, self._offset)
        except FileNotFoundError:
            restarted, begin, data = self._offset > 0, 0, b""
            self._offset, self._mark = 0, b""
        if not data:
            return LineBlock(0, b"", True) if restarted else None
        self._offset += len(data)
        self._mark = data[-_MARK_BYTES:]
        return LineBlock(begin, data, restarted)

    def skip_to_end(self) -> None:
        """Pass over everything that is there."""
        try:
            with self._path.open("rb") as file:
                self._offset = last_line_end(file.fileno())
                file.seek(max(0, self._offset - _MARK_BYTES))
                self._mark = file.read(min(self._offset, _MARK_BYTES))
        except FileNotFoundError:
            self._offset, self._mark = 0, b""

    def _is_the_same(self, file: BinaryIO) -> bool:
        file.seek(self._offset - len(self._mark))
        return file.read(len(self._mark)) == self._mark


def _read_lines(file: BinaryIO, offset: int) -> bytes:
    """Whole lines from an offset on: at most `_READ_BYTES`, but at least one line if a whole one is there."""
    file.seek(offset)
    data = b""
    while more := file.read(_READ_BYTES):
        data += more
        if b"\n" in more:
            break
    return data[: data.rfind(b"\n") + 1]


def last_line_end(file: int) -> int:
    """Where the last whole line of an open file ends, bytes."""
    end = os.lseek(file, 0, os.SEEK_END)
    while end > 0:
        begin = max(0, end - _BLOCK_BYTES)
        os.lseek(file, begin, os.SEEK_SET)
        newline = os.read(file, end - begin).rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0


class EventTail:
    """Follows an events file from its beginning.

    It gives the lines as they come: after a resume or rollback `drop_superseded` says which of them still count.
    """

    def __init__(self, path: Path) -> None:
        """Follow the file at `path`, which need not exist yet."""
        self._cursor = LineCursor(path)

    def poll(self) -> list[Event]:
        """The events that were completed since the last call."""
        found: list[Event] = []
        while block := self._cursor.next_block():
            found += [event for event in map(parse_event, block.data.split(b"\n")) if event is not None]
        return found

    def skip(self) -> None:
        """Pass over the events that are there, without reading them."""
        self._cursor.skip_to_end()


def read_events(path: Path) -> list[Event]:
    """The events that count, in order; a partial last line and unreadable lines are ignored."""
    return drop_superseded(EventTail(path).poll())


def drop_superseded(events: Iterable[Event]) -> list[Event]:
    """Leave out what a later resume or rollback has undone: steps, measurements, samples and checkpoints above it."""
    kept: list[Event] = []
    for event in events:
        if event["type"] in GOES_BACK:
            back_to = event.get("step") or 0
            kept = [e for e in kept if e["type"] not in SUPERSEDED or (e.get("step") or 0) <= back_to]
        kept.append(event)
    return kept


def parse_event(line: bytes) -> Event | None:
    """The event of a line, or None where the line is none that this version knows."""
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
