"""The Runs page: all runs, the queue, curves of several runs beside each other, and what can be done with a run."""

from __future__ import annotations

import html
import json
import time
from typing import Any

import gradio as gr
import pandas as pd

from mapo_core import ConfigError
from mapo_core.runs import (
    RunDir,
    attach,
    ensure_queue_runner,
    is_locked,
    list_runs,
    move_in_queue,
    queue_entries,
    reader_of,
    remove_folder,
    remove_from_queue,
)

from . import run_view
from .context import AppContext, shown
from .run_panel import ask, run_choices

_TICK_S = 3.0
_MOST_ROWS = 100
COMPARED = {
    "held-out accuracy": "accuracy",
    "held-out margin": "held_out_margin",
    "loss": "loss",
    "margin": "margin",
    "error of chosen": "chosen_mse",
    "error of rejected": "rejected_mse",
    "learning rate": "learning_rate",
}


def build(context: AppContext) -> None:
    """Put the page together; called inside its tab."""
    view: dict[str, Any] = {}
    gr.Markdown("One run trains at a time per graphics card; the others wait. They go on when this page is closed.")
    view["table"] = gr.HTML(table_html(context), elem_id="runs-table")
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            view["run"] = gr.Dropdown(run_choices(context), value=None, label="Run", elem_id="runs-run")
            with gr.Row():
                view["open"] = gr.Button("Open in Train", size="sm", min_width=130)
                view["clone"] = gr.Button("Copy its settings", size="sm", min_width=130)
            with gr.Row():
                view["add"] = gr.Button("Start or resume", size="sm", min_width=130)
                view["stop"] = gr.Button("Stop and save", size="sm", min_width=130)
            with gr.Row():
                view["up"] = gr.Button("Earlier in the queue", size="sm", min_width=130)
                view["down"] = gr.Button("Later in the queue", size="sm", min_width=130)
            view["delete"] = gr.Button("Delete", size="sm", variant="stop", min_width=130)
            with gr.Group(visible=False) as view["sure"]:
                view["question"] = gr.Markdown("")
                with gr.Row():
                    view["yes"] = gr.Button("Delete for good", size="sm", variant="stop", min_width=130)
                    view["no"] = gr.Button("Keep", size="sm", min_width=130)
        with gr.Column(scale=2, min_width=320):
            with gr.Row():
                view["several"] = gr.Dropdown(
                    run_choices(context), value=[], multiselect=True, label="Compare", elem_id="runs-compare", scale=2
                )
                view["what"] = gr.Dropdown(list(COMPARED), value="loss", label="Curve", min_width=150)
            view["plot"] = gr.LinePlot(
                x="step",
                y="value",
                color="run",
                height=300,
                y_title=" ",
                color_title=" ",
                show_label=False,
                elem_id="plot-compare",
                buttons=["fullscreen"],
            )
    _connect(context, view, gr.Timer(_TICK_S), gr.State(()))


# --- what is shown ---------------------------------------------------------------------------------------------------


def table_html(context: AppContext) -> str:
    """All runs, the queue first, as a table that a narrow screen can scroll."""
    rows = [_row(context, run) for run in list_runs(context.home)[:_MOST_ROWS]]
    if not rows:
        return "<p>There are no runs yet. Start one on the Train page.</p>"
    heads = "".join(f"<th>{name}</th>" for name in ("Run", "State", "Step", "Accuracy", "Method", "Model", "Made"))
    return f"<div class='mapo-grid mapo-runs'><table><tr>{heads}</tr>{''.join(rows)}</table></div>"


def _row(context: AppContext, run: RunDir) -> str:
    state, status = run_view.state_of(run)
    config = run_view.read_config(run)
    waiting = [entry.run for entry in queue_entries(context.home) if entry.waiting]
    place = f" · place {waiting.index(run.name) + 1}" if run.name in waiting else ""
    measured = reader_of(run).events("evaluated")
    accuracy = measured[-1].get("accuracy") if measured and measured[-1].get("step") else None
    model = str((config.get("model") or {}).get("path", "")).replace("\\", "/").rstrip("/").rpartition("/")[2]
    steps = status.steps or run_view.steps_asked(run)
    cells = (
        f"<b>{html.escape(run.name)}</b>",
        run_view.badge(state) + place,
        f"{status.step} / {steps or '?'}",
        f"{accuracy:.0%}" if isinstance(accuracy, int | float) else "",
        html.escape(str((config.get("method") or {}).get("type", ""))),
        html.escape(model),
        run_view.ago(run.config.stat().st_mtime),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def compared(context: AppContext, names: list[str], what: str) -> pd.DataFrame | None:
    """One curve of several runs, as a table of step, value and run; None without points."""
    rows: list[tuple[int, float, str]] = []
    for name in names:
        run = context.run(name)
        reader, curve = reader_of(run), COMPARED[what]
        if curve in ("accuracy", "held_out_margin"):
            key = "accuracy" if curve == "accuracy" else "margin"
            points = [(e.get("step") or 0, e.get(key)) for e in reader.events("evaluated")]
        else:
            course = reader.curves([curve], run_view.POINTS)
            points = list(zip(course.steps, course.values[curve], strict=True))
        rows += [(step, value, name) for step, value in points if value is not None]
    return pd.DataFrame(rows, columns=["step", "value", "run"]) if rows else None


def delete(context: AppContext, run: RunDir) -> str:
    """Delete a run's folder; what to say about it.

    Raises:
        ConfigError: it is being trained.
    """
    if attach(run) is not None or is_locked(run):
        raise ConfigError(f"Run {run.name} is being trained. Stop it first, then delete it.")
    remove_from_queue(run.name, context.home)
    remove_folder(run.path)
    return f"Run {run.name} is deleted."


# --- wires -----------------------------------------------------------------------------------------------------------


def _connect(context: AppContext, view: dict[str, Any], timer: gr.Timer, stamp: gr.State) -> None:
    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    lists = [view["table"], view["run"], view["several"], stamp]

    def listed(before: Any = None) -> Any:
        ensure_queue_runner(context.home)
        now = tuple(run_view.stamp(run) for run in list_runs(context.home))
        now += tuple(entry.run for entry in queue_entries(context.home))
        if before is not None and json.dumps(now) == json.dumps(before):
            return [gr.skip()] * len(lists)
        choices = gr.update(choices=run_choices(context))
        return [table_html(context), choices, choices, now]

    timer.tick(shown(listed), stamp, lists, **quiet)
    for name in ("run", "several"):
        view[name].focus(lambda: gr.update(choices=run_choices(context)), None, view[name], **quiet)

    def does(act: Any) -> Any:
        @shown
        def acting(name: str) -> Any:
            gr.Info(act(context.run(name)))
            return listed()

        return acting

    def moved(by: int) -> Any:
        def move(run: RunDir) -> str:
            move_in_queue(run.name, by, context.home)
            return f"{run.name} moved {'up' if by < 0 else 'down'}."

        return move

    actions = {
        "add": lambda run: ask(context, run, "resume"),
        "stop": lambda run: ask(context, run, "stop"),
        "up": moved(-1),
        "down": moved(1),
    }
    for name, act in actions.items():
        view[name].click(does(act), view["run"], lists, **quiet)

    @shown
    def opened(name: str) -> Any:
        return context.run(name).name, gr.Tabs(selected="train")

    assert context.open_run is not None
    view["open"].click(opened, view["run"], [context.open_run, context.tabs], **quiet)

    @shown
    def cloned(name: str) -> Any:
        # With the time, so that the same run chosen twice is a change.
        return [context.run(name).name, time.time()], gr.Tabs(selected="train")

    view["clone"].click(cloned, view["run"], [context.clone, context.tabs], **quiet)

    @shown
    def asked(name: str) -> Any:
        run = context.run(name)
        size = sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()) / 1e6
        words = f"Delete **{run.name}** with its checkpoints, pictures and LoRA ({size:.0f} MB)? This cannot be undone."
        return gr.update(visible=True), words

    view["delete"].click(asked, view["run"], [view["sure"], view["question"]], **quiet)

    @shown
    def deleted(name: str) -> Any:
        gr.Info(delete(context, context.run(name)))
        table, runs, several, now = listed()
        return [table, {**runs, "value": None}, {**several, "value": []}, now, gr.update(visible=False)]

    view["yes"].click(deleted, view["run"], [*lists, view["sure"]], **quiet)
    view["no"].click(lambda: gr.update(visible=False), None, view["sure"], **quiet)
    for event in (view["several"].change, view["what"].change, timer.tick):
        event(
            shown(lambda names, what: run_view.chart(compared(context, names or [], what), "run")),
            [view["several"], view["what"]],
            view["plot"],
            **quiet,
        )
