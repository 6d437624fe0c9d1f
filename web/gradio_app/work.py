"""Long work on a page: it runs in a thread, the page shows how far it is, and Cancel ends it."""

from __future__ import annotations

import html
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from mapo_core.runs import JobStoppedError

from .run_view import duration

_POLL_S = 0.3
_PACE_S = 3.0  # before that the pace says little
_RUNNING: dict[tuple[str, str], threading.Event] = {}


@dataclass(frozen=True)
class Step:
    """How far the work is.

    Attributes:
        what: is being done.
        done, total: of it.
        left_s: about how long it will take, seconds; None where that is not known yet.
    """

    what: str
    done: int
    total: int
    left_s: float | None = None


@dataclass(frozen=True)
class Done:
    """What came of the work."""

    value: Any


def work(
    request: gr.Request | None,
    slot: str,
    do: Callable[[Callable[[str, int, int], None], Callable[[], bool]], Any],
    goes_on: bool = False,
) -> Iterator[Step | Done]:
    """Do something that takes a while, and say how far it is.

    Args:
        request: of the visitor; its Cancel button finds the work by it.
        slot: name of the place on the page; one piece of work at a time runs in it.
        do: is called with `progress(what, done, total)` and `should_stop()`, as `run_job` takes them.
        goes_on: whether it comes to its end when the visitor closes the page.

    Yields:
        Steps, and what `do` gave as the last.

    Raises:
        JobStoppedError: it was cancelled.
        Exception: whatever `do` raised.
    """
    key = (_visitor(request), slot)
    cancel(request, slot)
    stop = _RUNNING[key] = threading.Event()
    said: queue.SimpleQueue[Step] = queue.SimpleQueue()
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = do(lambda what, done, total: said.put(Step(what, done, total)), stop.is_set)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=run, daemon=True, name=f"work-{slot}")
    thread.start()
    pace = _Pace()
    last = Step("starting", 0, 1)
    try:
        yield last
        while thread.is_alive():
            thread.join(_POLL_S)
            new = _latest(said)
            if new is not None and new != last:
                last = new
                yield pace.timed(last)
    finally:
        if not goes_on:
            stop.set()  # the visitor has gone, or it is done anyway
        if _RUNNING.get(key) is stop:
            del _RUNNING[key]
    if "error" in outcome:
        raise outcome["error"]
    yield Done(outcome["value"])


class _Pace:
    """How long work will take, by how long it has taken."""

    def __init__(self) -> None:
        self._first: tuple[float, Step] | None = None  # the first report of what is being done now

    def timed(self, step: Step) -> Step:
        """The step with the time left, once it has gone on for some seconds."""
        now = time.monotonic()
        if self._first is None or self._first[1].what != step.what or step.done < self._first[1].done:
            self._first = (now, step)
        began, first = self._first
        passed, done = now - began, step.done - first.done
        if passed < _PACE_S or done <= 0 or step.total <= step.done:
            return step
        return replace(step, left_s=passed / done * (step.total - step.done))


def cancel(request: gr.Request | None, slot: str) -> None:
    """End the work that this visitor has started in a place of the page, if there is any."""
    running = _RUNNING.get((_visitor(request), slot))
    if running is not None:
        running.set()


def cancel_button(slot: str) -> gr.Button:
    """A Cancel button for `slot`; show it while the work runs."""
    button = gr.Button("Cancel", variant="stop", visible=False, elem_id=f"cancel-{slot}")

    def stop(request: gr.Request) -> None:
        cancel(request, slot)

    button.click(stop, queue=False, api_visibility="private")
    return button


def bar(step: Step) -> str:
    """A progress bar in words and colour."""
    share = min(1.0, step.done / step.total) if step.total > 0 else 0.0
    count = f" {step.done} of {step.total}" if step.total > 1 else " …"
    if step.left_s is not None:
        count += f", about {duration(step.left_s)} left"
    return (
        f"<div class='mapo-status' role='status'>{html.escape(step.what)}{count}"
        f"<div class='mapo-bar'><div style='width:{100 * share:.1f}%'></div></div></div>"
    )


def note(words: str) -> str:
    """A line below a button."""
    return f"<div class='mapo-status' role='status'>{html.escape(words)}</div>"


def shown_while(
    request: gr.Request | None,
    slot: str,
    do: Callable[[Callable[[str, int, int], None], Callable[[], bool]], Any],
    finish: Callable[[Any], tuple[str, tuple[Any, ...]]],
    others: int,
    goes_on: bool = False,
) -> Iterator[tuple[Any, ...]]:
    """The updates of a page while work runs: (progress, cancel button, others...).

    Args:
        request, slot, do, goes_on: as of `work`.
        finish: from what `do` gave to a closing line and the values of the other outputs.
        others: how many other outputs there are; they stay as they are until the end, and when it is cancelled.
    """
    skip = (gr.skip(),) * others
    try:
        for state in work(request, slot, do, goes_on):
            if isinstance(state, Step):
                yield bar(state), gr.update(visible=True), *skip
            else:
                words, values = finish(state.value)
                yield note(words), gr.update(visible=False), *values
    except JobStoppedError as stopped:
        yield note(str(stopped)), gr.update(visible=False), *skip
    except BaseException as error:
        if not isinstance(error, GeneratorExit):
            yield "", gr.update(visible=False), *skip
        raise


def _latest(said: queue.SimpleQueue[Step]) -> Step | None:
    found = None
    while not said.empty():
        found = said.get()
    return found


def _visitor(request: gr.Request | None) -> str:
    return str(getattr(request, "session_hash", "") or "")
