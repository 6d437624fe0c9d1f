"""A run as the Train page shows it: state, buttons, curves, pictures and log, while it trains and after."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mapo_core import ConfigError
from mapo_core.runs import RunDir, add_to_queue, end_run, ensure_queue_runner, list_runs, run_status

from . import run_view
from .context import AppContext

CHARTS = {
    "loss": "Loss",
    "margin": "Margin",
    "accuracy": "Held-out accuracy",
    "errors": "Errors of chosen and rejected",
    "learning_rate": "Learning rate",
    "memory": "Memory, GB",
}
_TICK_S = 1.5
_NO_RUN = "<div class='mapo-status'>No run yet: start one on this page.</div>"


class RunPanel:
    """A run while it trains and after: state, buttons, curves, pictures, log."""

    def __init__(self, context: AppContext) -> None:
        """Draw it."""
        self.context = context
        self.run = gr.Dropdown(run_choices(context), label="Run", value=None, elem_id="train-run")
        self.status = gr.HTML(_NO_RUN, elem_id="run-status")
        with gr.Row():
            self.pause = gr.Button("Pause", size="sm", min_width=90, interactive=False)
            self.resume = gr.Button("Resume", size="sm", min_width=90, interactive=False)
            self.stop = gr.Button("Stop and save", size="sm", min_width=90, variant="stop", interactive=False)
        with gr.Row():
            self.save = gr.Button("Save now", size="sm", min_width=90, interactive=False)
            self.sample = gr.Button("Sample now", size="sm", min_width=90, interactive=False)
        self.plots: dict[str, gr.LinePlot] = {}
        names = list(CHARTS)
        self._row(names[:1])
        self._row(names[1:3])
        with gr.Accordion("More curves: errors, learning rate, memory", open=False):
            self._row(names[3:])
        self.gallery = gr.Gallery(
            label="Pictures: base model, LoRA",
            columns=1,
            height=360,
            object_fit="contain",
            elem_id="run-samples",
            visible=False,
        )
        with gr.Accordion("Log", open=False):
            self.warnings = gr.Markdown("")
            self.log = gr.Textbox(show_label=False, lines=12, max_lines=12, elem_classes="mapo-log", autoscroll=True)
        self.stamp = gr.State(())
        self.timer = gr.Timer(_TICK_S)

    def _row(self, names: list[str]) -> None:
        with gr.Row():
            for name in names:
                self.plots[name] = gr.LinePlot(
                    x="step",
                    y="value",
                    color="line",
                    title=CHARTS[name],
                    y_title=" ",
                    color_title=" ",
                    height=210,
                    min_width=260,
                    show_label=False,
                    elem_id=f"plot-{name}",
                    buttons=["fullscreen"],
                )

    @property
    def outputs(self) -> list[Any]:
        """What `show` fills."""
        buttons = [self.pause, self.resume, self.stop, self.save, self.sample]
        return [self.stamp, self.status, *buttons, *self.plots.values(), self.gallery, self.warnings, self.log]

    def show(self, name: str | None, before: Any = None) -> Any:
        """The run as it is now; nothing where nothing is new."""
        ensure_queue_runner(self.context.home)
        if not name:
            return gr.skip()
        try:
            run = self.context.run(name)
        except ConfigError:
            blank = [gr.update(interactive=False)] * 5
            gone = "<div class='mapo-status'>This run was deleted. Choose another.</div>"
            return [(), gone, *blank, *([gr.update(value=None)] * len(self.plots)), gr.update(visible=False), "", ""]
        now = run_view.stamp(run)
        if before is not None and tuple(before) == now:
            return gr.skip()
        state, status = run_view.state_of(run)
        on, off = gr.update(interactive=True), gr.update(interactive=False)
        again = "Stop at once" if state == "stopping" else "Stop and save"
        again = "Take out of the queue" if state == "waiting" else again
        buttons = [
            on if state == "running" else off,
            on if state == "paused" or (state in run_view.RESUMABLE and not status.alive) else off,
            gr.update(interactive=state in run_view.ACTIVE, value=again),
            on if state == "running" else off,
            on if state == "running" else off,
        ]
        points = run_view.curves(run)
        pictures = run_view.samples(run)
        said = "\n".join(f"- {text}" for text in run_view.warnings(run)[-8:])
        return [
            now,
            run_view.status_html(run),
            *buttons,
            *(run_view.chart(points[name]) for name in self.plots),
            gr.update(value=pictures, visible=bool(pictures)),
            said,
            run_view.log_tail(run),
        ]


def run_choices(context: AppContext) -> list[tuple[str, str]]:
    """All runs, newest first, with their state."""
    return [(f"{run.name} · {run_view.state_of(run)[0]}", run.name) for run in list_runs(context.home)]


def resume(run: RunDir) -> str:
    """Go on with a run that is paused, stopped, failed or interrupted; what to say about it."""
    status = run_status(run)
    if status.alive and status.state in ("running", "paused"):
        run.request("resume")
        return f"{run.name} goes on."
    ahead = add_to_queue(run)
    return f"{run.name} waits for {ahead} other run(s)." if ahead else f"{run.name} goes on."


def ask(context: AppContext, run: RunDir, verb: str) -> str:
    """Make a request of a run; what to say about it."""
    if verb == "stop":
        return end_run(run, context.home)
    if verb == "resume":
        return resume(run)
    status = run_status(run)
    if not status.alive or status.state not in ("running", "paused"):
        raise ConfigError(f"Run {run.name} is not being trained at the moment, so it cannot {verb}.")
    run.request(verb)
    words = {"pause": "pauses after this step", "save": "saves a checkpoint and the LoRA", "sample": "draws pictures"}
    return f"{run.name} {words[verb]}."
