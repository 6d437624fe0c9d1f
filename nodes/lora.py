"""Load a run's LoRA at any of its checkpoints."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..mapo_core import MapoError, load_config
from ..mapo_core.runs import RunDir, reader_of
from . import _comfy
from ._choose import BEST, run_inputs, run_of, step_of
from ._job import job
from ._types import LoraName


class LoadMaPOLoRA(io.ComfyNode):
    """A run's LoRA on a model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOLoadLoRA",
            display_name="Load MaPO LoRA",
            category="MaPO",
            description="Puts a run's LoRA on a model: the best checkpoint, the last one, or any step that is kept.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the LoRA was trained for."),
                io.Clip.Input("clip", optional=True, tooltip="Its text encoder; the LoRA may change it too."),
                *run_inputs(),
                io.String.Input(
                    "checkpoint",
                    default=BEST,
                    tooltip="best: by accuracy on held-out pairs. last: the newest. Or the number of a step that is kept.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength on the model; a larger value shows more of the style.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength on the text encoder, where the LoRA changes it.",
                ),
            ],
            outputs=[
                io.Model.Output("with_lora", display_name="model"),
                io.Clip.Output("clip_with_lora", display_name="clip"),
                io.String.Output("trigger", display_name="trigger words"),
                LoraName.Output("lora_name", display_name="lora name"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name: str, checkpoint: str, **others: object) -> str:
        return newest_state(run_name, checkpoint)

    @classmethod
    def execute(
        cls,
        model: Any,
        run_name: str,
        checkpoint: str,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        run: RunDir | None = None,
    ) -> io.NodeOutput:
        chosen = run_of(run_name, run)
        step = step_of(chosen, checkpoint)
        path = lora_of_step(chosen, step, cls.hidden.unique_id)
        name = _comfy.publish_lora(path)
        with_lora = _comfy.apply_lora(model, clip, path, strength_model, strength_clip)
        return io.NodeOutput(*with_lora, load_config(chosen.config).export.trigger, name)


def newest_state(run_name: str, checkpoint: str) -> str:
    """Changes when the run that a name means, or its checkpoints, do."""
    try:
        run = run_of(run_name, None)
        return f"{run.name} {[p.name for p in run.list_checkpoints()]} {checkpoint}"
    except MapoError:  # said in execute, where it becomes the node's error
        return ""


def lora_of_step(run: RunDir, step: int, node_id: str) -> Any:
    """The LoRA file of a checkpoint, written by a child process if it is not there yet."""
    ends = reader_of(run).events("run_finished", "run_stopped")
    finished = run.export / f"{run.name}.safetensors"
    if ends and ends[-1].get("step") == step and finished.exists():  # written then, and not since
        return finished
    path = run.export / f"{run.name}-{step:08d}.safetensors"
    if not path.exists():
        job("export", {"run": str(run.path), "step": step, "out": str(path)}, _comfy.Progress(node_id))
    return path


NODES = [LoadMaPOLoRA]
