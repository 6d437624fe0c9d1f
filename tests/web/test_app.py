"""The app as a whole: it comes up quickly, stays on this machine, and fits small and dark screens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

TABS = ("Pairs", "Train", "Results", "Runs", "Evaluate")
PAINT = "() => performance.getEntriesByType('paint').find(e => e.name === 'first-contentful-paint')?.startTime ?? 1e9"


def test_the_page_comes_up_and_asks_nobody_else(app: Any, open_page: Callable[..., Any], show_tab: Any) -> None:
    """`open_page` fails the test when anything is fetched from another machine."""
    page = open_page(app.url)
    for title in TABS:
        show_tab(page, title)
    page.wait_for_timeout(2000)  # for what a page fetches after it is shown


def test_first_paint(app: Any, open_page: Callable[..., Any]) -> None:
    open_page(app.url)  # the first visitor waits for the server's own first time, too
    start = time.monotonic()
    page = open_page(app.url)
    until_usable = time.monotonic() - start
    paint = page.evaluate(PAINT) / 1000
    print(f"first paint {paint:.2f} s, tabs after {until_usable:.2f} s")
    assert paint < 3.0


WIDER = """width => [...document.querySelectorAll('#mapo-tabs button, #mapo-tabs input, #mapo-tabs .block')]
  .filter(e => e.checkVisibility({visibilityProperty: true, opacityProperty: true}) && !e.closest('[aria-hidden=true]'))
  .filter(e => !e.closest('.mapo-grid, .mapo-strip') && e.getBoundingClientRect().right > width + 1)
  .map(e => e.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(app: Any, open_page: Callable[..., Any], show_tab: Any, width: int) -> None:
    page = open_page(app.url, width=width)
    for title in TABS:
        show_tab(page, title)
        page.wait_for_timeout(500)  # lets the page lay itself out before it is measured
        assert page.evaluate("() => document.documentElement.scrollWidth") <= width, title
        assert page.evaluate(WIDER, width) == [], title
