"""The Train page in a browser: a whole training with the real trainer, and its corners with one that only counts."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mapo_core import load_settings
from mapo_core.runs import attach, list_runs, read_events, run_status

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

NAME = "#train-name input, #train-name textarea"

STEP = "() => Number(/Step (\\d+) of/.exec(document.querySelector('#run-status')?.textContent ?? '')?.[1] ?? -1)"
STATE = "() => document.querySelector('#run-status .mapo-badge')?.textContent ?? ''"
LONG_MS = 600_000  # a real training on two busy cores


def wait_step(page: Any, step: int) -> None:
    page.wait_for_function(f"least => ({STEP})() >= least", arg=step, timeout=LONG_MS)


def wait_state(page: Any, state: str) -> None:
    page.wait_for_function(f"state => ({STATE})() === state", arg=state, timeout=LONG_MS)


def fill(page: Any, key: str, value: object) -> None:
    field = page.locator(f"#set-{key} input").first
    field.fill(str(value))
    field.press("Tab")


def start(page: Any, name: str, **settings: object) -> None:
    """Fill the form and press Start."""
    page.locator(NAME).fill(name)
    for key, value in settings.items():
        fill(page, key.replace("__", "-"), value)
    page.locator("#train-start").click()


def press(page: Any, title: str) -> None:
    page.locator("#tab-train").get_by_role("button", name=title, exact=True).click()


def test_a_whole_training_on_the_demo_model(app: Any, few: str, open_page: Callable[..., Any], show_tab: Any) -> None:
    """Start, see the curve move, reload in mid-run, stop and save in the middle, resume, and come to the end."""
    page = open_page(app.url)
    show_tab(page, "Train")
    page.locator("#train-pairs input").click()
    page.get_by_role("option", name=few).first.click()
    start(page, "seen", training__steps=80)
    page.locator("#run-status").get_by_text("seen", exact=True).wait_for()  # until then another run may be shown
    wait_step(page, 2)
    points = page.locator("#plot-loss canvas, #plot-loss svg").first
    points.wait_for()
    page.reload(wait_until="domcontentloaded")
    show_tab(page, "Train")
    wait_step(page, 3)
    press(page, "Stop and save")
    wait_state(page, "stopped")
    run = next(run for run in list_runs(app.home) if run.name == "seen")
    stopped_at = run_status(run).step
    assert 0 < stopped_at < 80
    assert (run.export / "seen.safetensors").is_file()
    assert page.evaluate(STEP) == stopped_at

    press(page, "Resume")
    wait_state(page, "finished")
    assert page.evaluate(STEP) == 80
    page.locator("#run-samples img").first.wait_for()
    steps = [event["step"] for event in read_events(run.events) if event["type"] == "step"]
    assert steps == list(range(1, 81))


def test_two_browsers_at_once(quick_app: Any, open_page: Callable[..., Any], show_tab: Any) -> None:
    """Each sees its own run; the second waits for the first, and starts when that is stopped."""
    pages = [open_page(quick_app.url) for _ in range(2)]
    for page, name, steps in zip(pages, ("first one", "second one"), (20_000, 20), strict=True):
        show_tab(page, "Train")
        start(page, name, training__steps=steps)
        page.locator("#run-status").get_by_text(name, exact=True).wait_for()
    wait_step(pages[0], 3)
    wait_state(pages[1], "waiting in the queue")
    press(pages[0], "Stop and save")
    wait_state(pages[0], "stopped")
    wait_state(pages[1], "finished")
    assert "first one" in pages[0].inner_text("#run-status")
    assert "second one" in pages[1].inner_text("#run-status")
    first, second = (quick_app.home / "runs" / name / "events.jsonl" for name in ("first one", "second one"))
    assert read_events(first)[-1]["time"] <= read_events(second)[0]["time"]


def test_the_server_dies_in_mid_run(
    start_app: Any, stand_in: Path, open_page: Callable[..., Any], show_tab: Any
) -> None:
    """The training and the queue do not notice; the next server shows the run and can stop it.

    The browser still knows what was started last, because the next server reads what the first one had it keep.
    """
    first = start_app(entry=stand_in)
    page = open_page(first.url)
    show_tab(page, "Train")
    start(page, "survivor", training__steps=20_000)
    wait_step(page, 3)
    page.goto("about:blank")  # the tab is gone, too
    first.kill()
    run = list_runs(first.home)[0]
    step = run_status(run).step
    assert attach(run) is not None

    start_app(entry=stand_in, home=first.home, port=int(first.url.rpartition(":")[2]))
    page.goto(first.url, wait_until="domcontentloaded")
    show_tab(page, "Train")
    page.wait_for_function("() => document.querySelector('#set-training-steps input').value === '20000'")
    assert page.locator(NAME).input_value() == "survivor"
    wait_step(page, step + 1)
    wait_state(page, "training")
    press(page, "Stop and save")
    wait_state(page, "stopped")
    assert [e["type"] for e in read_events(run.events)].count("run_started") == 1


def test_the_buttons(quick_app: Any, open_page: Callable[..., Any], show_tab: Any) -> None:
    page = open_page(quick_app.url)
    show_tab(page, "Train")
    start(page, "asked", training__steps=20_000)
    page.locator("#run-status").get_by_text("asked", exact=True).wait_for()
    wait_step(page, 2)
    run = next(run for run in list_runs(quick_app.home) if run.name == "asked")
    press(page, "Pause")
    wait_state(page, "paused")
    page.locator("#tab-train").get_by_role("button", name="Save now").is_disabled()
    press(page, "Resume")
    wait_state(page, "training")
    press(page, "Sample now")
    page.locator("#run-samples img").first.wait_for()
    press(page, "Save now")
    page.wait_for_function("() => [...document.querySelectorAll('.toast-body')].some(t => /saves/.test(t.textContent))")
    press(page, "Stop and save")
    wait_state(page, "stopped")
    kinds = [event["type"] for event in read_events(run.events)]
    assert {"paused", "sample_saved", "checkpoint_saved", "run_stopped"} <= set(kinds)


def test_goals_search_and_yaml(quick_app: Any, open_page: Callable[..., Any], show_tab: Any, tmp_path: Path) -> None:
    page = open_page(quick_app.url)
    show_tab(page, "Train")
    page.get_by_label("General preference · beta 8").check()
    page.get_by_text("Chosen: what people prefer.").wait_for()
    page.get_by_text("Advanced: every setting").click()
    page.locator("#search-settings textarea, #search-settings input").first.fill("warmup")
    page.locator("#set-optimizer-warmup_steps").wait_for()
    fill(page, "optimizer-warmup_steps", 3)
    assert not page.locator("#set-adapter-rank").is_visible()
    press(page, "Show as YAML")
    code = page.locator(".cm-content")
    code.get_by_text("warmup_steps").wait_for()
    with page.expect_download() as download:
        page.locator("#tab-train a[download]").first.click()
    download.value.save_as(tmp_path / "settings.yaml")
    values = load_settings(tmp_path / "settings.yaml")
    assert values["method"] == {"type": "mapo", "parametrisation": "paper", "beta": 8}
    assert values["optimizer"]["warmup_steps"] == 3

    other = {**values, "name": "from a file", "training": {**values["training"], "steps": 77}}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    page.locator("#tab-train input[type=file]").first.set_input_files(tmp_path / "other.yaml")
    page.wait_for_function("() => document.querySelector('#set-training-steps input').value === '77'")
    assert page.locator(NAME).input_value() == "from a file"
    (tmp_path / "wrong.yaml").write_text("training: {stepz: 1}")
    page.locator("#tab-train input[type=file]").first.set_input_files(tmp_path / "wrong.yaml")
    page.get_by_text(re.compile("did you mean training.steps")).first.wait_for()


def test_errors_are_messages(quick_app: Any, open_page: Callable[..., Any], show_tab: Any) -> None:
    page = open_page(quick_app.url)
    show_tab(page, "Train")
    start(page, "a/b")
    page.get_by_text(re.compile("cannot be a file name")).first.wait_for()
    assert "Traceback" not in page.inner_text("body")


def test_what_a_run_needs_is_measured(quick_app: Any, open_page: Callable[..., Any], show_tab: Any) -> None:
    """With the real job, which takes two steps of the demo model."""
    page = open_page(quick_app.url)
    show_tab(page, "Train")
    page.locator("#train-start").wait_for()
    if not page.locator("#train-measure").is_visible():
        pytest.skip("this version has no memory plan")
    page.locator("#train-measure").click()
    needs = page.locator("#train-needs textarea")
    needs.wait_for(timeout=LONG_MS)
    assert re.search(r"step", needs.input_value())
