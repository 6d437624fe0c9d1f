"""The training actions for programs: `gradio_client` calls these by name (docs/gradio.md)."""

from __future__ import annotations

from typing import Any

import gradio as gr
import yaml

from mapo_core import ConfigError, merge_settings
from mapo_core.pairs import list_sets
from mapo_core.runs import list_runs

from . import run_view
from .context import AppContext, shown
from .run_panel import ask
from .train_request import model_path, start


def build(context: AppContext) -> None:
    """Register the functions; nothing is drawn but what a download needs."""

    @shown
    def start_run(name: str, model: str = "demo", pairs: str = "demo", settings: str = "") -> dict[str, Any]:
        """Make a run and queue it.

        Args:
            name: of the run and of the LoRA file; a number is added where it is taken.
            model: a checkpoint, a folder, a Hub id, or demo.
            pairs: a kept set, a folder, a list of pairs, or demo.
            settings: YAML or JSON as in docs/settings.md; the rest is the default.
        """
        values = parsed(settings)
        context.check_settings(values)
        values = merge_settings(values, {"name": name.strip(), "model": {"path": model_path(context, model)}})
        run, words = start(context, values, pairs)
        return {**described(context, run.name), "message": words}

    @shown
    def run_status(name: str) -> dict[str, Any]:
        """Where a run stands: state, step, steps, seconds_left, loss, margin, accuracy, message, lora."""
        return described(context, name)

    @shown
    def runs() -> list[dict[str, Any]]:
        """All runs, newest first, each as run_status has it."""
        return [described(context, run.name) for run in list_runs(context.home)]

    @shown
    def pair_sets() -> list[str]:
        """The names of the kept pair sets."""
        return list(list_sets(context.home))

    @shown
    def run_curves(name: str) -> dict[str, Any]:
        """The points of the charts: for each chart a list of {step, value, line}."""
        return {chart: table.to_dict("records") for chart, table in run_view.curves(context.run(name)).items()}

    for function, api_name in (
        (start_run, "start_run"),
        (run_status, "run_status"),
        (runs, "list_runs"),
        (pair_sets, "list_pair_sets"),
        (run_curves, "run_curves"),
    ):
        gr.api(function, api_name=api_name)

    for verb in ("stop", "pause", "resume", "save", "sample"):
        gr.api(_action(context, verb), api_name=f"{verb}_run" if verb in ("stop", "pause", "resume") else f"{verb}_now")

    @shown
    def download_lora(name: str) -> str:
        """The run's LoRA file."""
        file = run_view.lora_of(context.run(name))
        if file is None:
            raise ConfigError(f"Run {name} has no LoRA file yet. Stop and save it, or wait for its end.")
        return file

    wanted, file = gr.Textbox(visible=False), gr.File(visible=False)
    gr.Button(visible=False).click(download_lora, wanted, file, api_name="download_lora")


def _action(context: AppContext, verb: str) -> Any:
    @shown
    def act(name: str) -> dict[str, Any]:
        words = ask(context, context.run(name), verb)
        return {**described(context, name), "message": words}

    act.__doc__ = f"Ask a run to {verb}; its status, and in `message` what was done."
    return act


def described(context: AppContext, name: str) -> dict[str, Any]:
    """A run as the functions above return it."""
    run = context.run(name)
    state, status = run_view.state_of(run)
    measured = run_view.last_measure(run)
    return {
        "name": run.name,
        "state": state,
        "alive": status.alive,
        "step": status.step,
        "steps": status.steps,
        "seconds_left": status.metrics.get("seconds_left") if status.alive else None,
        "loss": status.metrics.get("loss"),
        "margin": measured.get("margin"),
        "accuracy": measured.get("accuracy"),
        "message": run_view.doing(run, state, status),
        "lora": run_view.lora_of(run),
    }


def parsed(text: str) -> dict[str, Any]:
    """Settings from YAML or JSON text.

    Raises:
        ConfigError: it is neither, or no mapping.
    """
    try:
        values = yaml.safe_load(text or "{}")
    except yaml.YAMLError as error:
        raise ConfigError(f"The settings are neither YAML nor JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError("The settings must be a mapping, such as: training: {steps: 500}")
    return values
