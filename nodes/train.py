"""Train LoRA: pairs and settings in, a LoRA that the stock loader lists out."""

from __future__ import annotations

import re
from typing import Any

from comfy_api.latest import io
from PIL import Image

from ..mapo_core import (
    ConfigError,
    MapoError,
    TrainConfig,
    TrainingError,
    build_config,
    checked_name,
    detect,
    merge_settings,
    run_chart,
)
from ..mapo_core.pairs import PairSet, pairs_text, require_scores
from ..mapo_core.runs import (
    RunDir,
    create_run,
    list_runs,
    remember_request,
    request_key,
    run_history,
    run_status,
    runs_of_request,
)
from . import _comfy
from ._follow import train_in_node
from ._types import LoraName, Pairs, Run, Settings

_AGAIN = ("stopped", "interrupted", "created", "failed")


class TrainLoRA(io.ComfyNode):
    """The trainer, in a process of its own."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOTrainLoRA",
            display_name="Train LoRA (MaPO)",
            category="MaPO",
            description="Trains a LoRA on preference pairs in a process of its own and puts it into the loras folder. Cancel saves what is there. The same inputs again reuse the finished run.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=_comfy.checkpoint_names(),
                    default=_comfy.DEMO,
                    tooltip="The base model: an SDXL or SD 1.5 checkpoint, or the small built-in demo model.",
                ),
                Pairs.Input("pairs", tooltip="From one of the Preference Pairs nodes."),
                io.String.Input(
                    "name",
                    default="my style",
                    tooltip="Name of the run and of the LoRA file. If another training has it already, a number is added; nothing is overwritten.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Seed of everything random; another one trains anew.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="Go on where the same training was stopped or interrupted. Off: begin a new run.",
                ),
                Settings.Input(
                    "settings", optional=True, tooltip="From the settings nodes; without them the published defaults."
                ),
            ],
            outputs=[
                LoraName.Output("lora_name", display_name="lora name"),
                io.LoraModel.Output("lora", display_name="lora model"),
                Run.Output("run", display_name="run"),
                io.Image.Output("chart", display_name="chart"),
                io.Image.Output("samples", display_name="samples"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None, name: str | None = None) -> bool | str:
        try:
            if name is not None:
                checked_name(name)
            if checkpoint is not None:
                if checkpoint not in _comfy.checkpoint_names():
                    return f"There is no checkpoint {checkpoint!r} any more. Choose one of the list (press R to refresh it)."
                detect(_comfy.checkpoint_path(checkpoint))
        except (MapoError, ValueError) as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, name: str, resume: bool, **others: object) -> str | float:
        """A training that was stopped is gone on with by the next Run, though nothing in the workflow has changed."""
        own = [run_status(run).state for run in list_runs() if resume and numbered(run.name, name)]
        return float("nan") if any(state in _AGAIN for state in own) else ""

    @classmethod
    def execute(
        cls, checkpoint: str, pairs: PairSet, name: str, seed: int, resume: bool, settings: dict[str, Any] | None = None
    ) -> io.NodeOutput:
        _comfy.require_packages()
        config = build_config(
            merge_settings(
                settings or {},
                {"name": name, "seed": seed, "model": {"path": _comfy.checkpoint_path(checkpoint)}},
                {"data": {"pairs": "pairs.jsonl"}},
            )
        )
        run = find_or_create(config, pairs, resume)
        if run_status(run).state != "finished":
            detect(config.model.path, config.model.family)
            _comfy.free_vram()
            try:
                train_in_node(run, cls.hidden.unique_id, config.training.steps)
            finally:
                keep_lora(run, name)
        return finished(run, name)


def numbered(run_name: str, name: str) -> bool:
    """Whether a run is called `name`, or `name-2`, `name-3`, ..."""
    return re.fullmatch(re.escape(name) + r"(-\d+)?", run_name) is not None


def find_or_create(config: TrainConfig, pairs: PairSet, resume: bool) -> RunDir:
    """The run of this very request on these very files: a finished one, one to go on with, or a new one."""
    if not pairs.pairs:
        raise ConfigError("There are no pairs to train on. Check the Preference Pairs node.")
    if "chosen_score" in config.method.build("sdxl").needs:
        require_scores(pairs.pairs, config.method.type)
    text = pairs_text(pairs.pairs)
    images = [path for pair in pairs.pairs for path in (pair.chosen, pair.rejected)]
    key = request_key(config.to_json(), text, images)
    known = [(run, run_status(run).state) for run in runs_of_request(key)]
    for run, state in known:
        if state == "finished" and (run.export / f"{run.name}.safetensors").exists():
            return run
    for run, state in known:
        if state in ("running", "paused", "stopping") or (resume and state in _AGAIN):
            return run
    run = create_run(config.name, config.to_json(), text)
    remember_request(run, key)
    return run


def keep_lora(run: RunDir, name: str) -> str | None:
    """Put the run's LoRA, if there is one yet, into the loras folder; its name there.

    The run may have been made under another name, if the request was the same but for it.
    """
    lora = run.export / f"{run.name}.safetensors"
    return _comfy.publish_lora(lora, name) if lora.exists() else None


def finished(run: RunDir, name: str) -> io.NodeOutput:
    """What the node gives for a run that has ended with a LoRA."""
    lora_name = keep_lora(run, name)
    if lora_name is None:
        raise TrainingError(f"Run {run.name} was stopped before its first step, so there is no LoRA. Run it again.")
    chart = _comfy.to_tensor([run_chart(run)])
    sheets = [run.path / path for path in run_history(run).samples]
    sheet = Image.open(sheets[-1]) if sheets else Image.new("RGB", (64, 64))
    samples = _comfy.to_tensor([sheet.convert("RGB")])
    lora = _comfy.load_lora_state(run.export / f"{run.name}.safetensors")
    ui_values = {"mapo_run": [run.name], "mapo_lora": [lora_name]}  # the page draws chart and pictures from the run
    return io.NodeOutput(lora_name, lora, run, chart, samples, ui=ui_values)


NODES = [TrainLoRA]
