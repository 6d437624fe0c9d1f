"""Follow a run's events without ever reading one twice, in little memory however long the run is."""

from __future__ import annotations

import math
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .events import GOES_BACK, SUPERSEDED, Event, LineCursor, parse_event
from .process import is_same_process
from .run_dir import RunDir
from .status import ENVELOPE, RunStatus, StatusFold

MAX_POINTS = 2000  # more than a chart has pixels

_SHARED_BYTES = 128 * 1024 * 1024  # of all readers that are kept; the one used longest ago goes first
_EVENT_BYTES = 1000  # roughly, of one that is kept as a dictionary
_NAN = math.nan


@dataclass(frozen=True)
class Curves:
    """Values over the steps, of at most as many points as were asked for.

    Attributes:
        steps: the last optimizer step of each point.
        values: name -> one value per point: the mean over the point's steps, None where no step has one.
    """

    steps: list[int]
    values: dict[str, list[float | None]]


class RunReader:
    """What the events of a run say, kept up to date by reading only what was added since the last time.

    Of step events it keeps numbers alone, 8 bytes each; other events as they are, but of an uninterrupted progress
    ("encoding images", 10 of 500, 20 of 500, ...) only the last. What a resume or rollback has undone is forgotten. A
    file that was cut, replaced or deleted is read anew. All methods may be called from several threads.
    """

    def __init__(self, run: RunDir) -> None:
        """Nothing is read before the first question."""
        self.run = run
        self._lock = threading.RLock()
        self._cursor = LineCursor(run.events)
        self._forget()

    def _forget(self) -> None:
        self._status = StatusFold()
        self._events: list[Event] = []
        self._steps = array("q")
        self._places = array("q")  # where in the file each step's line begins
        self._columns: dict[str, array[float]] = {}

    # --- reading -----------------------------------------------------------------------------------------------------

    def poll(self) -> int:
        """Read what was added; the number of new events. Every other method does so by itself."""
        with self._lock:
            count = 0
            while block := self._cursor.next_block():
                if block.restarted:
                    self._forget()
                place = block.offset
                for line in block.data.split(b"\n"):
                    if line and (event := parse_event(line)) is not None:
                        self._add(event, place)
                        count += 1
                    place += len(line) + 1
            return count

    def _add(self, event: Event, place: int) -> None:
        kind = event["type"]
        self._status.add(event)
        if kind == "step":
            self._add_step(event, place)
            return
        if kind in GOES_BACK:
            self._go_back(event.get("step") or 0)
        if self._events and _carries_on(self._events[-1], event):
            self._events[-1] = event
        else:
            self._events.append(event)

    def _add_step(self, event: Event, place: int) -> None:
        for name, value in event.items():
            if name in ENVELOPE or name == "steps" or name in self._columns:
                continue
            if isinstance(value, int | float) and not isinstance(value, bool):
                self._columns[name] = array("d", [_NAN]) * len(self._steps)
        for name, column in self._columns.items():
            value = event.get(name)
            column.append(value if isinstance(value, int | float) else _NAN)
        self._steps.append(event.get("step") or 0)
        self._places.append(place)

    def _go_back(self, back_to: int) -> None:
        self._events = [e for e in self._events if e["type"] not in SUPERSEDED or (e.get("step") or 0) <= back_to]
        kept = [i for i, step in enumerate(self._steps) if step <= back_to]
        if len(kept) == len(self._steps):
            return
        self._steps = array("q", (self._steps[i] for i in kept))
        self._places = array("q", (self._places[i] for i in kept))
        self._columns = {n: array("d", (column[i] for i in kept)) for n, column in self._columns.items()}
        self._status.last_step(self._line(-1) if kept else {})

    def _line(self, index: int) -> Event:
        with self.run.events.open("rb") as file:
            file.seek(self._places[index])
            return parse_event(file.readline()) or {}

    # --- telling -----------------------------------------------------------------------------------------------------

    def status(self) -> RunStatus:
        """Where the run stands now."""
        with self._lock:
            while True:
                self.poll()
                process = self._status.process
                if process is None or is_same_process(*process):
                    return self._status.status(alive=process is not None)
                # Read again now that it is known to be gone: its last words may have come in between.
                self.poll()
                if self._status.process == process:
                    return self._status.status(alive=False)

    def process(self) -> tuple[int, float | None] | None:
        """Id and start time of the process that last took the run up, or None if none ever did."""
        with self._lock:
            self.poll()
            return self._status.process

    def starts(self) -> int:
        """How often a process took the run up."""
        with self._lock:
            self.poll()
            return self._status.starts

    def events(self, *kinds: str) -> list[Event]:
        """The events that count, in order, all but the steps; with `kinds` only those."""
        with self._lock:
            self.poll()
            return [e for e in self._events if not kinds or e["type"] in kinds]

    def phase(self) -> Event | None:
        """What the trainer is at, if it is not stepping: the last phase event unless a step has come since."""
        with self._lock:
            self.poll()
            return self._status.phase

    def step_count(self) -> int:
        """How many step events count."""
        with self._lock:
            self.poll()
            return len(self._steps)

    def names(self) -> list[str]:
        """The numbers that step events carry: loss, metrics of the method, learning rate, seconds and so on."""
        with self._lock:
            self.poll()
            return list(self._columns)

    def curves(self, names: Sequence[str] | None = None, max_points: int = MAX_POINTS) -> Curves:
        """Numbers over the steps.

        Args:
            names: of `names`, or "margin": how much larger the rejected image's error is; None: all of `names`. A name
                that no event has gives a curve of None.
            max_points: longer curves are averaged over neighbouring steps down to at most this many points.
        """
        with self._lock:
            self.poll()
            count = len(self._steps)
            width = max(1, -(-count // max_points))
            starts = range(0, count, width)
            steps = [self._steps[min(start + width, count) - 1] for start in starts]
            wanted = list(self._columns) if names is None else names
            return Curves(steps, {n: [_mean(c[s : s + width]) for s in starts] for n in wanted for c in [self._of(n)]})

    def _of(self, name: str) -> array[float]:
        if name == "margin":
            pairs = zip(self._of("rejected_mse"), self._of("chosen_mse"), strict=True)
            return array("d", (rejected - chosen for rejected, chosen in pairs))
        return self._columns.get(name) or array("d", [_NAN]) * len(self._steps)

    @property
    def kept_bytes(self) -> int:
        """Memory for what was read, roughly."""
        return 8 * len(self._steps) * (2 + len(self._columns)) + _EVENT_BYTES * len(self._events)


def _carries_on(before: Event, event: Event) -> bool:
    """Whether both are progress of one phase, so that the later one says all."""
    both = before["type"] == event["type"] == "phase" and before.get("phase") == event.get("phase")
    return both and before.get("total") is not None and event.get("total") is not None


def _mean(values: array[float]) -> float | None:
    total = sum(values)
    if math.isnan(total):
        known = [v for v in values if not math.isnan(v)]
        return sum(known) / len(known) if known else None
    return total / len(values)


# --- the readers that this process keeps -----------------------------------------------------------------------------

_shared: OrderedDict[Path, RunReader] = OrderedDict()
_shared_lock = threading.Lock()


def reader_of(run: RunDir) -> RunReader:
    """This process's reader of a run, so that everyone who asks for a run's course reads only what is new.

    Readers that have not been asked for longest are dropped when all together keep more than 128 MB.
    """
    path = run.path.absolute()
    with _shared_lock:
        reader = _shared.setdefault(path, RunReader(RunDir(path)))
        _shared.move_to_end(path)
        while len(_shared) > 1 and sum(r.kept_bytes for r in _shared.values()) > _SHARED_BYTES:
            _shared.popitem(last=False)
        return reader


def run_status(run: RunDir) -> RunStatus:
    """The status of a run, from its events and its process and nothing else."""
    return reader_of(run).status()
