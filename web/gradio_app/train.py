"""The Train page: what to train on the left, how it goes on the right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from mapo_core.runs import JobStoppedError, RunDir, list_runs

from . import run_view
from .context import AppContext, shown
from .forms import SettingsForm
from .run_panel import RunPanel, ask, run_choices
from .train_form import connect_form, draw_request, form_defaults
from .train_request import settings_of, start
from .work import shown_while


def build(context: AppContext) -> None:
    """Put the page together; called inside its tab."""
    form = SettingsForm(form_defaults())
    with gr.Row():
        with gr.Column(scale=5, min_width=340):
            asked = draw_request(context, form)
        with gr.Column(scale=6, min_width=340):
            panel = RunPanel(context)
    _connect(context, form, asked, panel)


def _connect(context: AppContext, form: SettingsForm, asked: dict[str, Any], panel: RunPanel) -> None:
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = {**private, "show_progress": "hidden"}

    @shown
    def started(request: gr.Request, name: str, pairs: str, model: str, *given: Any) -> Any:
        values = settings_of(context, form, name, model, given)
        last = {"name": name, "pairs": pairs, "model": model, "settings": form.values(given)}

        def make(progress: Callable[[str, int, int], None], stop: Callable[[], bool]) -> tuple[RunDir, str]:
            def looked(done: int, total: int) -> None:
                if stop():
                    raise JobStoppedError("Cancelled: nothing was started.")
                progress("looking at the pictures", done, total)

            progress("reading the pairs", 0, 1)
            return start(context, values, pairs, looked)

        def finish(made: tuple[RunDir, str]) -> tuple[str, tuple[Any, ...]]:
            run, words = made
            gr.Info(words)
            return words, (gr.update(choices=run_choices(context), value=run.name), run.name, last)

        yield from shown_while(request, "start", make, finish, 3, goes_on=True)

    asked["start"].click(
        started,
        [asked["name"], asked["pairs"], asked["model"], *form.inputs],
        [asked["starting"], asked["start_stop"], panel.run, context.open_run, context.last],
        **quiet,
    ).success(panel.show, panel.run, panel.outputs, **quiet)

    def requested(verb: str) -> Callable[[str], Any]:
        @shown
        def act(name: str) -> Any:
            gr.Info(ask(context, context.run(name), verb))
            return panel.show(name)

        return act

    for button, verb in (
        (panel.pause, "pause"),
        (panel.resume, "resume"),
        (panel.stop, "stop"),
        (panel.save, "save"),
        (panel.sample, "sample"),
    ):
        button.click(requested(verb), panel.run, panel.outputs, **quiet)

    panel.timer.tick(shown(panel.show), [panel.run, panel.stamp], panel.outputs, **quiet)
    panel.run.input(lambda name: name, panel.run, context.open_run, **quiet).then(
        shown(panel.show), panel.run, panel.outputs, **quiet
    )
    panel.run.focus(lambda: gr.update(choices=run_choices(context)), None, panel.run, **quiet)

    @shown
    def opened(kept: str) -> Any:
        choices = run_choices(context)
        names = [name for _, name in choices]
        active = [run.name for run in list_runs(context.home) if run_view.state_of(run)[0] in run_view.ACTIVE]
        shown_run = kept if kept in names else next(iter([*active, *names]), None)
        rest = panel.show(shown_run) if shown_run else [gr.skip()] * len(panel.outputs)
        return [gr.update(choices=choices, value=shown_run), *rest]

    assert context.app is not None
    assert context.open_run is not None
    context.app.load(opened, context.open_run, [panel.run, *panel.outputs], **quiet)
    context.open_run.change(opened, context.open_run, [panel.run, *panel.outputs], **quiet)  # by another page
    connect_form(context, form, asked, private, quiet)
