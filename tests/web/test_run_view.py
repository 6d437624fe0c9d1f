"""What the page says of a run, read from its folder; and what may be done with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="install gradio to test the page")

from mapo_core import ConfigError, MapoError  # noqa: E402
from mapo_core.runs import EventWriter, JobStoppedError, RunDir, acquire_run_lock, create_run, queue_entries  # noqa: E402
from mapo_core.runs import queue as queue_module  # noqa: E402
from web.gradio_app import run_view, runs_page  # noqa: E402
from web.gradio_app.api import described, parsed  # noqa: E402
from web.gradio_app.context import AppContext  # noqa: E402
from web.gradio_app.run_panel import ask  # noqa: E402
from web.gradio_app.train_request import model_path, pair_choices, start  # noqa: E402

CONFIG = json.dumps({"training": {"steps": 10}, "method": {"type": "mapo"}, "model": {"path": "/m/<b>.safetensors"}})


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AppContext:
    """Nothing is started: the queue keeps what it is given."""
    monkeypatch.setattr(queue_module, "ensure_queue_runner", lambda home=None: False)
    monkeypatch.setattr(runs_page, "ensure_queue_runner", lambda home=None: False)
    return AppContext(home=tmp_path)


def trained(context: AppContext, name: str = "ink", steps: int = 6, last: str | None = None) -> RunDir:
    run = create_run(name, CONFIG, "", context.home)
    with EventWriter(run) as events:
        events.emit("run_started", 0, steps=10)
        for step in range(1, steps + 1):
            errors = {"chosen_mse": 0.1, "rejected_mse": 0.1 + step / 10, "peak_memory_bytes": 3e9}
            events.emit("step", step, loss=1 / step, learning_rate=1e-4, seconds_left=90.4, **errors)
        events.emit("evaluated", steps, accuracy=0.75, margin=0.2, base={"accuracy": 0.5, "margin": 0.0})
        events.emit("warning", steps, message="the error of chosen pictures rises")
        if last:
            events.emit(last, steps, message="no <memory>")  # type: ignore[arg-type]
    return run


def test_the_points_of_the_charts(context: AppContext) -> None:
    points = run_view.curves(trained(context))
    assert list(points["loss"]["step"]) == [1, 2, 3, 4, 5, 6]
    assert list(points["loss"]["value"]) == pytest.approx([1 / n for n in range(1, 7)])
    assert list(points["memory"]["value"]) == pytest.approx([3.0] * 6)
    margin = points["margin"]
    assert set(margin["line"]) == {"training", "held out", "base"}
    assert list(margin[margin["line"] == "training"]["value"]) == pytest.approx([n / 10 for n in range(1, 7)])
    assert list(margin[margin["line"] == "held out"]["value"]) == [0.2]
    assert sorted(points["accuracy"]["value"]) == [0.5, 0.75]


def test_a_line_that_comes_later_changes_the_chart(context: AppContext) -> None:
    """gradio's page draws new points in the lines that it knows; only another set of colours makes it look again."""
    margin = run_view.curves(trained(context))["margin"]
    early, late = run_view.chart(margin[margin["line"] == "training"]), run_view.chart(margin)
    assert list(early["color_map"]) == ["training"]
    assert set(late["color_map"]) == {"training", "held out", "base"}
    assert early["color_map"]["training"] == late["color_map"]["training"]
    assert run_view.chart(margin[:0])["value"] is None


def test_the_words_of_every_state(context: AppContext, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = trained(context)  # by this very process, as its events say
    assert "1 min 30 s</b> left" in run_view.status_html(alive)
    assert "Step <b>6</b> of 10" in run_view.status_html(alive)
    assert "held-out accuracy 75%" in run_view.status_html(alive)
    assert ask(context, alive, "pause") == "ink pauses after this step."
    assert alive.is_pending("pause")
    failed = trained(context, "torn", last="run_failed")
    assert "no &lt;memory&gt;" in run_view.status_html(failed)
    with pytest.raises(ConfigError, match="not being trained"):
        ask(context, trained(context, "done", last="run_finished"), "save")
    waiting = create_run("later", CONFIG, "", context.home)
    assert ask(context, waiting, "resume") == "later goes on."
    assert run_view.state_of(waiting)[0] == "waiting"
    assert "Place 1 in the queue" in run_view.status_html(waiting)
    assert "Step <b>0</b> of 10" in run_view.status_html(waiting)
    assert "no longer waits" in ask(context, waiting, "stop")
    assert described(context, "later")["state"] == "created"


def test_the_table_shows_names_as_they_are(context: AppContext) -> None:
    assert "no runs yet" in runs_page.table_html(context)
    trained(context, "a & b", last="run_stopped")
    table = runs_page.table_html(context)
    assert "a &amp; b" in table
    assert "&lt;b&gt;.safetensors" in table
    assert "75%" in table
    assert "6 / 10" in table


def test_compared_curves(context: AppContext) -> None:
    trained(context, "one", last="run_stopped")
    trained(context, "two", steps=3, last="run_stopped")
    table = runs_page.compared(context, ["one", "two"], "margin")
    assert table is not None
    assert dict(table["run"].value_counts()) == {"one": 6, "two": 3}
    accuracy = runs_page.compared(context, ["one"], "held-out accuracy")
    assert accuracy is not None
    assert list(accuracy["value"]) == [0.75]
    assert runs_page.compared(context, [], "loss") is None


def test_a_run_that_is_trained_is_not_deleted(context: AppContext) -> None:
    run = create_run("busy", CONFIG, "", context.home)
    with acquire_run_lock(run), pytest.raises(ConfigError, match="Stop it first"):
        runs_page.delete(context, run)
    assert run.config.exists()
    ask(context, run, "resume")
    assert "is deleted" in runs_page.delete(context, run)
    assert not run.path.exists()
    assert queue_entries(context.home) == []


def test_a_start_is_checked_and_queued(context: AppContext) -> None:
    from mapo_core import demo_values

    assert pair_choices(context) == [("demo: cartoon pictures (built in)", "demo")]
    run, words = start(context, demo_values("mine", steps=3), "demo")
    assert "160 pairs" in words
    assert [entry.run for entry in queue_entries(context.home)] == [run.name]
    with pytest.raises(MapoError, match="no pairs"):
        start(context, demo_values("mine"), str(context.home / "nowhere"))

    def cancelled(done: int, total: int) -> None:
        raise JobStoppedError("Cancelled.")

    with pytest.raises(JobStoppedError):
        start(context, demo_values("not mine"), "demo", cancelled)
    assert [path.name for path in (context.home / "runs").iterdir()] == [run.name]
    assert model_path(context, "demo") == "demo"
    assert model_path(context, "stabilityai/stable-diffusion-xl-base-1.0").count("/") == 1
    assert Path(model_path(context, "model.safetensors")).is_absolute()
    with pytest.raises(ConfigError, match="base model"):
        model_path(context, " ")


def test_settings_from_programs() -> None:
    assert parsed("training: {steps: 5}") == {"training": {"steps": 5}}
    assert parsed('{"seed": 3}') == {"seed": 3}
    assert parsed("") == {}
    for text in ("[1, 2]", "a: [", "just words"):
        with pytest.raises(ConfigError):
            parsed(text)


def test_the_log_is_shown_in_whole_lines(context: AppContext, monkeypatch: Any) -> None:
    run = create_run("ink", CONFIG, "", context.home)
    assert run_view.log_tail(run) == ""
    run.log.write_bytes(b"first\r\n" + b"x" * 6000 + b"\n 10%\r 50%\r100%\nlast \xff\n")
    assert run_view.log_tail(run) == "100%\nlast �"
