"""Where a run stands, told from its events one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .events import GOES_BACK, STARTS, Event

State = Literal["created", "running", "paused", "stopping", "finished", "stopped", "failed", "interrupted"]

ENVELOPE = ("v", "time", "type", "step")
_ENDS: dict[str, State] = {"run_finished": "finished", "run_stopped": "stopped", "run_failed": "failed"}


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


class StatusFold:
    """The status so far; every event carries it on.

    Attributes:
        process: id and start time of the process that last took the run up, or None if none ever did.
        starts: how often a process took the run up.
        phase: the last phase event, None once a step has followed it.
    """

    def __init__(self) -> None:
        self.process: tuple[int, float | None] | None = None
        self.starts = 0
        self.phase: Event | None = None
        self._state: State = "created"
        self._step = 0
        self._steps: int | None = None
        self._message = ""
        self._time: float | None = None
        self._metrics: dict[str, Any] = {}

    def add(self, event: Event) -> None:
        """Take the next event in."""
        kind = event["type"]
        self._state = _next_state(self._state, event)
        self._step = (event.get("step") or 0) if kind in GOES_BACK else event.get("step") or self._step
        self._steps = event.get("steps", self._steps)
        self._time = event["time"]
        if kind in ("phase", "step"):
            self.phase = event if kind == "phase" else None
        if kind == "step":
            self.last_step(event)
        elif kind in STARTS or kind in _ENDS or kind in ("phase", "paused"):
            self._message = event.get("message") or event.get("phase") or ""
        if kind in STARTS:
            self.starts += 1
            if isinstance(event.get("pid"), int):
                self.process = (event["pid"], event.get("pid_started"))

    def last_step(self, event: Event) -> None:
        """Say which step event is now the last, after later ones have been undone; {} if none is left."""
        self._metrics = {name: value for name, value in event.items() if name not in ENVELOPE}

    def status(self, alive: bool) -> RunStatus:
        """The status, given whether the process runs."""
        state, message = self._state, self._message
        if not alive and state in ("running", "paused", "stopping"):
            state = "interrupted"
            message = f"The process ended at step {self._step} without a word: it was killed, or it crashed."
        pid = self.process[0] if self.process else None
        return RunStatus(state, self._step, self._steps, message, pid, alive, self._time, dict(self._metrics))


def _next_state(state: State, event: Event) -> State:
    kind = event["type"]
    if kind in _ENDS:
        return _ENDS[kind]
    if kind in STARTS:
        return "running"
    # A stop is not taken back: whatever the trainer does after it belongs to the stopping.
    if state == "stopping" or (kind == "phase" and event.get("phase") == "stopping"):
        return "stopping"
    if kind == "paused":
        return "paused"
    return "running" if kind in ("phase", "step") else state
