"""The left side of the Train page: what to train, from which settings, and where these come from and go to."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gradio as gr

from mapo_core import GOALS, MapoError, build_config, demo_values, load_settings, merge_settings, settings_text
from mapo_core.runs import run_job

from .context import AppContext, shown
from .forms import BASIC, SettingsForm
from .train_request import DATA, DEMO, model_choices, pair_choices, plan_note, remember_needs, settings_of
from .work import cancel_button, shown_while

logger = logging.getLogger("mapo.ui")

NO_GOAL = "as set under Advanced"


def draw_request(context: AppContext, form: SettingsForm) -> dict[str, Any]:
    """The left side of the page; its components by name."""
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
        value=DEMO,
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
    asked["plan_note"] = gr.Markdown(elem_id="train-plan-note")
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
        asked["start_stop"] = cancel_button("start")
    asked["starting"] = gr.HTML(padding=False, elem_id="train-starting")
    with gr.Accordion("Advanced: every setting", open=False, elem_id="train-advanced"):
        form.draw_rest()
        with gr.Row():
            asked["export"] = gr.Button("Show as YAML", size="sm")
            asked["import"] = gr.UploadButton("Load YAML or JSON", size="sm", file_types=[".yaml", ".yml", ".json"])
            asked["reset"] = gr.Button("Defaults", size="sm")
        asked["yaml"] = gr.Code(label="Settings", language="yaml", visible=False, interactive=False)
        asked["yaml_file"] = gr.File(label="settings.yaml", visible=False, interactive=False)
    return asked


def connect_form(
    context: AppContext, form: SettingsForm, asked: dict[str, Any], private: dict[str, Any], quiet: dict[str, Any]
) -> None:
    """Its buttons to functions; `private` and `quiet` are options of every event."""
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
        values = form.values(given)
        if model == DEMO:
            gr.Info("The demo model is small: its own settings (steps, learning rate, rank) were put in.")
            return form.updates(merge_settings(values, form_defaults()))
        kept = without_demo(values)
        if kept == values:
            return [gr.skip()] * len(form.inputs)
        gr.Info("The demo model's own settings were taken out again; what you changed yourself stays.")
        return form.updates(kept)

    asked["model"].input(model_chosen, [asked["model"], *form.inputs], form.inputs, **quiet)

    @shown
    def measured(request: gr.Request, name: str, model: str, *given: Any) -> Any:
        values = merge_settings(settings_of(context, form, name, model, given), DATA)
        build_config(values)

        def finish(found: dict[str, Any]) -> tuple[str, tuple[Any, ...]]:
            remember_needs(context, values, found)
            note = plan_note(context, values)
            return "Measured with two real steps.", (gr.update(value=found["text"], visible=True), note)

        yield from shown_while(
            request,
            "preflight",
            lambda progress, stop: run_job(
                "preflight", {"settings": values, "pairs": None}, progress=progress, should_stop=stop
            ),
            finish,
            2,
        )

    told = [asked["measuring"], asked["measure_stop"], asked["needs"], asked["plan_note"]]
    asked["measure"].click(measured, whole, told, **quiet)

    def noted(name: str, model: str, *given: Any) -> str:
        try:
            return plan_note(context, settings_of(context, form, name or "x", model, given))
        except MapoError:  # a setting that is wrong is said when it is used
            return ""

    plan = form.widgets.get(("memory", "plan"))
    for change in (*([plan.change] if plan else []), asked["model"].change):
        change(noted, whole, asked["plan_note"], trigger_mode="always_last", **quiet)

    @shown
    def refreshed() -> Any:
        return gr.update(choices=pair_choices(context)), gr.update(choices=model_choices(context, again=True))

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
        build_config(merge_settings({"name": "settings", "model": {"path": DEMO}}, values, DATA))
        named = (values.get("name"), (values.get("model") or {}).get("path"))
        return [*(gr.skip() if value is None else value for value in named), *form.updates(values)]

    asked["import"].upload(shown(lambda file: filled(load_settings(Path(file)))), asked["import"], whole, **private)
    asked["reset"].click(
        shown(lambda model: filled(form_defaults() if model == DEMO else {})), asked["model"], whole, **quiet
    )

    def refilled(kept: Any) -> list[Any]:
        """What was last started from this browser; only what differs from the page as it is built."""
        nothing = [gr.skip()] * (len(whole) + 1)
        if not isinstance(kept, dict) or not kept:
            return nothing
        try:
            values = {**kept["settings"], "name": kept["name"], "model": {**kept["settings"].get("model", {})}}
            values["model"]["path"] = kept["model"]
            wanted = filled(values)
        except (MapoError, KeyError, TypeError, AttributeError) as error:  # of another version of the settings
            logger.info("what the browser remembers of the Train page is not used: %s", error)
            return nothing
        built = ["", "", *form.updates(form.start)]
        return [
            kept.get("pairs") or gr.skip(),
            *(gr.skip() if a == b else a for a, b in zip(wanted, built, strict=True)),
        ]

    assert context.app is not None
    context.app.load(refilled, context.last, [asked["pairs"], *whole], **quiet).then(
        noted, whole, asked["plan_note"], **quiet
    )

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


def form_defaults() -> dict[str, Any]:
    """What the page begins with: the demo model's own settings, because the demo model is chosen."""
    return _without_names(demo_values("demo"))


def _without_names(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("name", "model", "seed")}


def without_demo(values: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that are as the demo model wants them: no other model does."""

    def rest(given: dict[str, Any], demo: dict[str, Any]) -> dict[str, Any]:
        kept = {}
        for name, value in given.items():
            if isinstance(value, dict) and isinstance(demo.get(name), dict):
                kept[name] = rest(value, demo[name])
            elif name == "type" or name not in demo or demo[name] != value:
                kept[name] = value
        return kept

    return {name: value for name, value in rest(values, form_defaults()).items() if value != {}}
