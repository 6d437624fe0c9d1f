"""The Train page: what to train on the left, how it goes on the right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import (
    GOALS,
    ConfigError,
    build_config,
    demo_values,
    find_models,
    load_settings,
    merge_settings,
    named_sets,
    pairs_from,
    request_run,
    settings_text,
)
from mapo_core.runs import RunDir, add_to_queue, list_runs, run_job

from . import run_view
from .context import AppContext, shown
from .forms import BASIC, SettingsForm
from .run_panel import RunPanel, ask, run_choices
from .work import cancel_button, shown_while

NO_GOAL = "as set under Advanced"
_DEMO_MODEL = "demo"


def build(context: AppContext) -> None:
    """Put the page together; called inside its tab."""
    form = SettingsForm(form_defaults())
    with gr.Row():
        with gr.Column(scale=5, min_width=340):
            asked = _draw_request(context, form)
        with gr.Column(scale=6, min_width=340):
            panel = RunPanel(context)
    _connect(context, form, asked, panel)


# --- what to train ---------------------------------------------------------------------------------------------------


def _draw_request(context: AppContext, form: SettingsForm) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    asked["name"] = gr.Textbox(
        value="my style", label="Name", info="Of the run and of the LoRA file.", elem_id="train-name"
    )
    asked["pairs"] = gr.Dropdown(
        pair_choices(context),
        value="demo",
        label="Pairs",
        info="A set from the Pairs page, the demo's pictures, or the path of a folder or a list of pairs.",
        allow_custom_value=True,
        elem_id="train-pairs",
    )
    asked["model"] = gr.Dropdown(
        model_choices(context),
        value=_DEMO_MODEL,
        label="Base model",
        info="A checkpoint found here, a path, a Hub id such as stabilityai/stable-diffusion-xl-base-1.0, or demo.",
        allow_custom_value=True,
        elem_id="train-model",
    )
    asked["refresh"] = gr.Button("Look for pairs and models again", size="sm", variant="secondary")
    asked["goal"] = gr.Radio(
        [(f"{goal.title} · beta {goal.beta:g}", goal.name) for goal in GOALS] + [("As set under Advanced", NO_GOAL)],
        value=NO_GOAL,
        label="What is it for?",
        info="Sets MaPO's paper form with the beta of the paper's Table 4: published, not measured by us.",
        elem_id="train-goal",
    )
    asked["goal_text"] = gr.Markdown("")
    with gr.Row():
        form.draw_basic(*BASIC)
    with gr.Row():
        planned = ("memory", "plan") in form.fields  # what is measured is the memory plan
        asked["measure"] = gr.Button("Measure what this needs", size="sm", elem_id="train-measure", visible=planned)
        asked["measure_stop"] = cancel_button("preflight")
    asked["measuring"] = gr.HTML("", padding=False)
    asked["needs"] = gr.Textbox(
        label="On this machine",
        lines=5,
        visible=False,
        interactive=False,
        elem_id="train-needs",
        elem_classes="mapo-log",
    )
    with gr.Row():
        asked["start"] = gr.Button("Start training", variant="primary", elem_id="train-start")
    with gr.Accordion("Advanced: every setting", open=False, elem_id="train-advanced"):
        form.draw_rest()
        with gr.Row():
            asked["export"] = gr.Button("Show as YAML", size="sm")
            asked["import"] = gr.UploadButton("Load YAML or JSON", size="sm", file_types=[".yaml", ".yml", ".json"])
            asked["reset"] = gr.Button("Defaults", size="sm")
        asked["yaml"] = gr.Code(label="Settings", language="yaml", visible=False, interactive=False)
        asked["yaml_file"] = gr.File(label="settings.yaml", visible=False, interactive=False)
    return asked


def pair_choices(context: AppContext) -> list[tuple[str, str]]:
    """The kept sets, and the demo's pictures."""
    return [*((name, name) for name in named_sets(context.home)), ("demo: cartoon pictures (built in)", "demo")]


def model_choices(context: AppContext) -> list[tuple[str, str]]:
    """The models in the folders that people keep them in."""
    found = find_models(folder for folder in _model_folders(context) if folder.is_dir())
    return [("demo: small built-in model", _DEMO_MODEL), *((f"{p.name}  ({p.parent})", str(p)) for p in found)]


def _model_folders(context: AppContext) -> list[Path]:
    folders = [context.home / "models", *context.data_roots]
    # Installed as a custom node, this pack lies in custom_nodes, beside models.
    comfyui = [os.environ.get("COMFYUI_DIR"), Path(__file__).resolve().parents[4]]
    for folder in comfyui:
        if folder and not context.listen and (checkpoints := Path(folder) / "models" / "checkpoints").is_dir():
            folders.append(checkpoints)
    return folders


def settings_of(
    context: AppContext, form: SettingsForm, name: str, model: str, given: tuple[Any, ...]
) -> dict[str, Any]:
    """All settings that the page shows.

    Raises:
        ConfigError: one names a file that may not be read.
    """
    values = merge_settings(form.values(given), {"name": name.strip(), "model": {"path": model_path(context, model)}})
    context.check_settings(values)
    return values


def model_path(context: AppContext, text: str) -> str:
    """A model as the settings take it: paths checked and made absolute, `demo` and Hub ids as they are."""
    words = str(text or "").strip()
    if not words:
        raise ConfigError("Choose a base model: a file or folder, a Hub id, or demo.")
    is_path = words.endswith(".safetensors") or words.count("/") != 1 or Path(words).expanduser().exists()
    return str(context.safe_path(words)) if is_path and words != _DEMO_MODEL else words


def start(
    context: AppContext, values: dict[str, Any], pairs: str, progress: Callable[[float, str], object] | None = None
) -> tuple[RunDir, str]:
    """Make a run of what was asked for and queue it; the run, and what to say about it."""
    source = str(pairs or "").strip()
    known = {value for _, value in pair_choices(context)}
    found = pairs_from(source if source in known else context.safe_path(source), context.home)
    if context.listen:
        context.check_readable(
            p for pair in found.pairs for p in (pair.chosen, pair.rejected, pair.chosen_mask, pair.rejected_mask)
        )

    def looked(done: int, total: int) -> None:
        if progress is not None:
            progress(done / max(1, total), "looking at the pictures")

    run, report = request_run(values, found, context.home, looked)
    ahead = add_to_queue(run)
    words = f"{len(found.pairs)} pairs, {len(report.warnings)} warnings."
    return run, f"{run.name} waits for {ahead} other run(s). {words}" if ahead else f"{run.name} starts. {words}"


# --- wires -----------------------------------------------------------------------------------------------------------


def _connect(context: AppContext, form: SettingsForm, asked: dict[str, Any], panel: RunPanel) -> None:
    private: dict[str, Any] = {"api_visibility": "private"}
    quiet: dict[str, Any] = {**private, "show_progress": "hidden"}

    @shown
    def started(name: str, pairs: str, model: str, progress: gr.Progress = gr.Progress(), *given: Any) -> Any:  # noqa: B008
        progress(0, "reading the pairs")
        values = settings_of(context, form, name, model, given)
        run, words = start(context, values, pairs, lambda share, text: progress(share, text))
        gr.Info(words)
        return gr.update(choices=run_choices(context), value=run.name), run.name

    asked["start"].click(
        started,
        [asked["name"], asked["pairs"], asked["model"], *form.inputs],
        [panel.run, context.open_run],
        show_progress_on=panel.status,
        **private,
    ).then(panel.show, panel.run, panel.outputs, **quiet)

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
    _connect_form(context, form, asked, private, quiet)


def _connect_form(
    context: AppContext, form: SettingsForm, asked: dict[str, Any], private: dict[str, Any], quiet: dict[str, Any]
) -> None:
    whole = [asked["name"], asked["model"], *form.inputs]

    @shown
    def goal_chosen(name: str, *given: Any) -> Any:
        goal = next((goal for goal in GOALS if goal.name == name), None)
        if goal is None:
            return "", *([gr.skip()] * len(form.inputs))
        return goal.text, *form.updates({**form.values(given), **goal.settings()})

    asked["goal"].input(goal_chosen, [asked["goal"], *form.inputs], [asked["goal_text"], *form.inputs], **quiet)

    @shown
    def model_chosen(model: str, *given: Any) -> Any:
        if model != _DEMO_MODEL:
            return [gr.skip()] * len(form.inputs)
        gr.Info("The demo model is small: its own settings (steps, learning rate, rank) were put in.")
        return form.updates(merge_settings(form.values(given), _without_names(demo_values("demo"))))

    asked["model"].input(model_chosen, [asked["model"], *form.inputs], form.inputs, **quiet)

    @shown
    def measured(request: gr.Request, name: str, model: str, *given: Any) -> Any:
        values = merge_settings(settings_of(context, form, name, model, given), _DATA)
        build_config(values)

        def finish(found: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
            return "Measured with two real steps.", (gr.update(value=found["text"], visible=True),)

        yield from shown_while(
            request,
            "preflight",
            lambda progress, stop: run_job(
                "preflight", {"settings": values, "pairs": None}, progress=progress, should_stop=stop
            ),
            finish,
            1,
        )

    asked["measure"].click(measured, whole, [asked["measuring"], asked["measure_stop"], asked["needs"]], **quiet)

    @shown
    def refreshed() -> Any:
        return gr.update(choices=pair_choices(context)), gr.update(choices=model_choices(context))

    asked["refresh"].click(refreshed, None, [asked["pairs"], asked["model"]], **private)
    asked["pairs"].focus(lambda: gr.update(choices=pair_choices(context)), None, asked["pairs"], **quiet)

    @shown
    def exported(name: str, model: str, *given: Any) -> Any:
        text = settings_text(settings_of(context, form, name, model, given))
        file = context.pictures / "settings.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return gr.update(value=text, visible=True), gr.update(value=str(file), visible=True)

    asked["export"].click(exported, whole, [asked["yaml"], asked["yaml_file"]], **quiet)

    def filled(values: dict[str, Any]) -> list[Any]:
        context.check_settings(values)
        build_config(merge_settings({"name": "settings", "model": {"path": _DEMO_MODEL}}, values, _DATA))
        named = (values.get("name"), (values.get("model") or {}).get("path"))
        return [*(gr.skip() if value is None else value for value in named), *form.updates(values)]

    asked["import"].upload(shown(lambda file: filled(load_settings(Path(file)))), asked["import"], whole, **private)
    asked["reset"].click(shown(lambda: filled({})), None, whole, **quiet)

    @shown
    def cloned(chosen: Any) -> Any:
        if not chosen:
            return [gr.skip()] * len(whole)
        name = chosen[0]
        values = load_settings(context.run(name).config)
        gr.Info(f"The settings of {name} are in the form. Choose the pairs, change what you like, and start.")
        return filled(values)

    assert context.clone is not None
    context.clone.change(cloned, context.clone, whole, **quiet)

    @shown
    def suggested(chosen: Any, *given: Any) -> Any:
        if not chosen:
            return [gr.skip()] * len(form.inputs)
        gr.Info(f"MaPO's paper form with beta {chosen[0]:g} is in the form. It is a heuristic's suggestion.")
        method = {"type": "mapo", "parametrisation": "paper", "beta": float(chosen[0])}
        return form.updates({**form.values(given), "method": method})

    assert context.beta is not None
    context.beta.change(suggested, [context.beta, *form.inputs], form.inputs, **quiet)


_DATA = {"data": {"pairs": "pairs.jsonl"}}


def form_defaults() -> dict[str, Any]:
    """What the page begins with: the demo model's own settings, because the demo model is chosen."""
    return _without_names(demo_values("demo"))


def _without_names(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("name", "model", "seed")}
