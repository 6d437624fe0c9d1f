"""A run on a terminal: progress with time left, Ctrl-C that keeps the work, and the closing lines."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from .runs import EventTail, start_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from .runs import RunDir, RunHandle

LINE_EVERY_S = 10.0  # seconds between two lines where the output is not a terminal


def duration(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60:02d} s"
    return f"{total // 3600} h {total % 3600 // 60:02d} min"


class ProgressLine:
    """One line that is rewritten on a terminal, and now and then a new line elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self._last = 0.0
        self._width = 0

    def show(self, text: str, final: bool = False) -> None:
        """Show where things stand."""
        if self.live:
            self.stream.write(f"\r{text[:118]:<{self._width}}")
            self._width = min(len(text), 118)
        elif final or time.monotonic() - self._last >= LINE_EVERY_S:
            self.stream.write(f"{text}\n")
            self._last = time.monotonic()
        self.stream.flush()

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.live and self._width:
            self.stream.write("\r" + " " * self._width + "\r")
            self._width = 0
        self.stream.write(f"{text}\n")
        self.stream.flush()


def counted(what: str, stream: TextIO | None = None) -> Callable[[int, int], None]:
    """Progress on a line of its own, with the time left; to be called with how much is done, and of how much."""
    line, started = ProgressLine(stream or sys.stderr), time.monotonic()

    def show(done: int, total: int) -> None:
        passed = time.monotonic() - started
        left = f", {duration(passed / done * (total - done))} left" if 0 < done < total and passed > 2 else ""
        line.show(f"{what} {done}/{total}{left}", final=done == total)
        if done == total and line.live:
            line.stream.write("\n")

    return show


def start_and_follow(run: RunDir, stream: TextIO | None = None) -> int:
    """Start a run's process, tied to this one, and show it to its end; the exit code is that of `follow`."""
    tail = EventTail(run.events)
    tail.skip()  # what an earlier process said is not news
    handle = start_run(run)
    try:
        return follow(handle, tail, stream)
    finally:
        handle.close()


def follow(handle: RunHandle, tail: EventTail, stream: TextIO | None = None) -> int:
    """Show a run until it ends. Ctrl-C asks it to stop and keep the work, a second one ends it at once.

    Args:
        handle: the run's process.
        tail: where to go on reading its events.
        stream: where to print; standard output by default.

    Returns:
        The exit code: 0 when the run finished or was stopped, 1 when it failed.
    """
    progress = ProgressLine(stream)
    interrupts = 0
    while True:
        try:
            for event in tail.poll():
                show_event(progress, event)
            if not handle.is_alive():
                break
            time.sleep(0.1)
        except KeyboardInterrupt:
            interrupts += 1
            if interrupts == 1:
                progress.line("Stopping after this step; the LoRA will be saved. Ctrl-C again ends it at once.")
                handle.request("stop")
            else:
                handle.kill()
    handle.wait(10)
    for event in tail.poll():
        show_event(progress, event)
    return closing(handle, progress)


def closing(handle: RunHandle, progress: ProgressLine) -> int:
    """Say how the run ended and what to do next."""
    run, status = handle.run, handle.status()
    if status.state == "failed":
        progress.line(f"The run failed: {status.message}")
        progress.line(f"Log: {run.log}")
        return 1
    if status.state == "interrupted":
        progress.line(f"The run was ended before it could save. Go on with: mapo resume {run.name}")
        progress.line(f"Log: {run.log}")
        return 1
    progress.line(status.message or status.state)
    return 0


def show_event(progress: ProgressLine, event: dict[str, Any]) -> None:
    """One event as a person reads it."""
    kind = event["type"]
    if kind == "phase" and event["phase"] == "ready":
        progress.line(
            f"{event['method']} on {event['family']}: {event['pairs']} pairs ({event['held_out_pairs']} held out), "
            f"{event['pairs_per_step']} per step, {event['steps']} steps, {event['precision']} on {event['device']}"
        )
    elif kind == "phase":
        share = f" {event['done']}/{event['total']}" if event.get("total") else ""
        progress.show(f"{event['phase']}{share} ...")
    elif kind == "run_resumed":
        progress.line(f"Going on after step {event['step'] or 0}.")
    elif kind == "step":
        progress.show(step_line(event), final=event["step"] == event["steps"])
    elif kind == "evaluated":
        base = event["base"]
        progress.line(
            f"step {event['step']}: held-out accuracy {event['accuracy']:.2f} (base {base['accuracy']:.2f}), margin "
            f"{event['margin']:+.4f} (base {base['margin']:+.4f}), chosen error {event['chosen_mse']:.4f} "
            f"(base {base['chosen_mse']:.4f})"
        )
    elif kind == "sample_saved":
        progress.line(f"step {event['step']}: pictures in {event['path']}")
    elif kind in {"warning", "paused", "rolled_back"}:
        progress.line(f"{kind.replace('_', ' ')}: {event['message']}")


def step_line(event: dict[str, Any]) -> str:
    """Where the training stands, in one line."""
    parts = [f"step {event['step']}/{event['steps']}"]
    for key, label in (("loss", "loss"), ("chosen_mse", "chosen"), ("rejected_mse", "rejected")):
        if event.get(key) is not None:
            parts.append(f"{label} {event[key]:.4f}")
    if event.get("rewards/accuracies") is not None:
        parts.append(f"accuracy {event['rewards/accuracies']:.2f}")
    parts.append(f"{event['seconds_per_step']:.2f} s/step")
    parts.append(f"{duration(event['seconds_left'])} left")
    return "  ".join(parts)
