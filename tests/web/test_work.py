"""Long work on a page: what is shown of it, and what ends it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="install gradio to test the page")

from mapo_core.runs import JobStoppedError  # noqa: E402
from web.gradio_app import work as module  # noqa: E402
from web.gradio_app.work import Done, Step, bar, cancel, shown_while, work  # noqa: E402

Progress, Stop = Callable[[str, int, int], None], Callable[[], bool]
SOON_S = 20


def until_stopped(begun: threading.Event, ended: threading.Event) -> Callable[[Progress, Stop], None]:
    def do(progress: Progress, stop: Stop) -> None:
        begun.set()
        try:
            while not stop():
                ended.wait(0.01)
            raise JobStoppedError("Stopped: counting.")
        finally:
            ended.set()

    return do


def test_progress_and_what_came_of_it() -> None:
    said = threading.Event()

    def do(progress: Progress, stop: Stop) -> int:
        progress("counting <b>", 1, 4)
        assert said.wait(SOON_S)  # until the page has shown it
        return 7

    seen = []
    for state in work(None, "count", do):
        seen.append(state)
        if state == Step("counting <b>", 1, 4):
            said.set()
    assert seen[-2:] == [Step("counting <b>", 1, 4), Done(7)]
    assert "counting &lt;b&gt; 1 of 4" in bar(seen[-2])
    assert "width:25.0%" in bar(seen[-2])


def test_what_goes_wrong_is_raised_and_the_cancel_button_goes() -> None:
    def do(progress: Progress, stop: Stop) -> None:
        raise ValueError("no")

    updates: list[Any] = []
    with pytest.raises(ValueError, match="no"):
        updates.extend(shown_while(None, "count", do, lambda value: ("", ()), 1))  # the error comes after some
    assert updates[0][1]["visible"]
    assert not updates[-1][1]["visible"]


def test_cancel_ends_it_with_its_word_and_leaves_the_rest_as_it_is() -> None:
    begun, ended = threading.Event(), threading.Event()
    running = shown_while(None, "count", until_stopped(begun, ended), lambda value: ("done", (1,)), 1)
    next(running)
    assert begun.wait(SOON_S)
    cancel(None, "another place")
    assert not ended.wait(0.1)
    cancel(None, "count")
    *_, (words, button, rest) = running
    assert "Stopped: counting." in words
    assert not button["visible"]
    assert rest == gr.skip()


@pytest.mark.parametrize("goes_on", [False, True])
def test_closing_the_page_ends_what_does_not_go_on(goes_on: bool) -> None:
    begun, ended = threading.Event(), threading.Event()
    given: list[Stop] = []

    def do(progress: Progress, stop: Stop) -> None:
        given.append(stop)
        until_stopped(begun, ended)(progress, lambda: stop() or ended.is_set())

    running = work(None, "count", do, goes_on)
    next(running)
    assert begun.wait(SOON_S)
    running.close()
    assert given[0]() is not goes_on
    ended.set()


def test_the_time_left_is_told_once_the_pace_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    pace = module._Pace()
    assert pace.timed(Step("looking", 0, 1000)).left_s is None
    now[0] += 2
    assert pace.timed(Step("looking", 20, 1000)).left_s is None  # too early to say
    now[0] += 8
    step = pace.timed(Step("looking", 100, 1000))
    assert step.left_s == pytest.approx(90)
    assert "100 of 1000, about 1 min 30 s left" in bar(step)
    assert pace.timed(Step("writing", 5, 10)).left_s is None  # something else has a pace of its own
    now[0] += 4
    assert pace.timed(Step("writing", 6, 10)).left_s == pytest.approx(16)
    assert pace.timed(Step("writing", 10, 10)).left_s is None
