"""The Runs page in a browser: queue, order, comparison, settings of another run, deletion."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mapo_core.runs import list_runs, queue_entries

from .test_api import few_pairs

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

NAME = "#train-name input, #train-name textarea"

SETTINGS = "training: {steps: %d}\nadapter: {rank: 3}"


def choose(page: Any, box: str, name: str) -> None:
    field = page.locator(f"{box} input").first
    field.click()
    page.locator("ul.options li, [role=listbox] li").filter(has_text=name).first.click()


def press(page: Any, title: str) -> None:
    page.locator("#tab-runs").get_by_role("button", name=title, exact=True).click()


def test_queue_compare_copy_and_delete(
    quick_app: Any, client_of: Any, open_page: Callable[..., Any], show_tab: Any, tmp_path: Path
) -> None:
    app, client, pairs = quick_app, client_of(quick_app), few_pairs(tmp_path)
    for name, steps in (("alpha", 30), ("beta", 20_000), ("gamma", 40), ("delta", 40)):
        client.predict(name, "demo", pairs, SETTINGS % steps, api_name="/start_run")
    page = open_page(app.url)
    show_tab(page, "Runs")
    table = page.locator("#runs-table")
    table.get_by_text("place 2").wait_for()

    choose(page, "#runs-run", "delta")
    press(page, "Earlier in the queue")
    page.get_by_text("delta moved up.").first.wait_for()
    waiting = [entry.run for entry in queue_entries(app.home) if entry.waiting]
    assert waiting.index("delta") < waiting.index("gamma")
    press(page, "Stop and save")
    page.get_by_text("no longer waits").first.wait_for()
    assert "delta" not in [entry.run for entry in queue_entries(app.home)]

    choose(page, "#runs-compare", "alpha")
    choose(page, "#runs-compare", "beta")
    page.locator("#plot-compare canvas, #plot-compare svg.marks").first.wait_for()

    press(page, "Copy its settings")
    page.wait_for_function("() => document.querySelector('#set-training-steps input')?.value === '40'")
    assert page.locator(NAME).input_value() == "delta"

    show_tab(page, "Runs")
    press(page, "Delete")
    page.get_by_text("This cannot be undone").wait_for()
    press(page, "Keep")
    assert "delta" in [run.name for run in list_runs(app.home)]
    press(page, "Delete")
    press(page, "Delete for good")
    page.get_by_text("delta is deleted").first.wait_for()
    assert "delta" not in [run.name for run in list_runs(app.home)]

    choose(page, "#runs-run", "beta")
    press(page, "Delete")
    press(page, "Delete for good")
    page.get_by_text("Stop it first").first.wait_for()
    assert "beta" in [run.name for run in list_runs(app.home)]
    press(page, "Stop and save")  # others use this server, too
    page.get_by_text("asked to stop").first.wait_for()
