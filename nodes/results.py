"""What a run has brought: sheets of pictures, and its report."""

from __future__ import annotations

import time
from pathlib import Path

from comfy_api.latest import io, ui
from PIL import Image

from ..mapo_core import ConfigError, merge_settings, run_chart, run_report
from ..mapo_core.pairs import PairSet, write_pairs
from ..mapo_core.runs import RunDir, mapo_home
from . import _comfy
from ._choose import BEST, run_inputs, run_of, step_of
from ._job import job
from ._types import Pairs, Settings
from .lora import newest_state

CATEGORY = "MaPO/results"


class Compare(io.ComfyNode):
    """Base beside LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOCompare",
            display_name="Compare with Base Model",
            category=CATEGORY,
            description="Draws the same prompts and seeds with the base model and with the LoRA, at several strengths and checkpoints, in a process of its own.",
            is_output_node=True,
            inputs=[
                *run_inputs(),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One prompt per line, a column each. Empty: the run's validation prompts.",
                ),
                io.String.Input(
                    "strengths", default="1.0", tooltip="Strengths of the LoRA, a row each, for example: 0.5, 1.0"
                ),
                io.String.Input(
                    "checkpoints",
                    default=BEST,
                    tooltip="best, last, or steps that are kept, for example: 500, 1000, last. A row for each with each strength.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**53 - 1,
                    control_after_generate=False,
                    tooltip="Seed of the first column; the next has the next one.",
                ),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, strengths: str | None = None) -> bool | str:
        try:
            numbers(strengths or "1")
        except ConfigError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, run_name: str, checkpoints: str, **others: object) -> str:
        return newest_state(run_name, checkpoints)

    @classmethod
    def execute(
        cls, run_name: str, prompts: str, strengths: str, checkpoints: str, seed: int, run: RunDir | None = None
    ) -> io.NodeOutput:
        chosen = run_of(run_name, run)
        words = [w for w in checkpoints.replace(",", " ").split()] or [BEST]
        arguments = {
            "run": str(chosen.path),
            "steps": list(dict.fromkeys(step_of(chosen, w) for w in words)),
            "prompts": [line.strip() for line in prompts.splitlines() if line.strip()] or None,
            "strengths": numbers(strengths),
            "seed": seed,
        }
        sheet = Image.open(job("compare", arguments, _comfy.Progress(cls.hidden.unique_id))["sheet"]).convert("RGB")
        image = _comfy.to_tensor([sheet])
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


class RunReport(io.ComfyNode):
    """A run in words and curves."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPORunReport",
            display_name="Run Report",
            category=CATEGORY,
            description="What a run was made of and what came of it: state, measures before and after, warnings, settings, files.",
            is_output_node=True,
            inputs=run_inputs(),
            outputs=[io.String.Output("report", display_name="report"), io.Image.Output("chart", display_name="chart")],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name: str, **others: object) -> float:
        return float("nan")  # cheap to make, and a run goes on

    @classmethod
    def execute(cls, run_name: str, run: RunDir | None = None) -> io.NodeOutput:
        chosen = run_of(run_name, run)
        text = run_report(chosen)
        chart = _comfy.to_tensor([run_chart(chosen)])
        preview = ui.PreviewImage(chart, cls=cls).as_dict()
        return io.NodeOutput(text, chart, ui={**preview, "mapo_text": [text]})


class Evaluate(io.ComfyNode):
    """Figures that say whether it worked."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOEvaluate",
            display_name="Evaluate LoRA",
            category=CATEGORY,
            description="Measures a LoRA against its base model: held-out pairs, win rate, drift on other prompts, diversity across seeds, all with intervals. In a process of its own.",
            is_output_node=True,
            inputs=[
                *run_inputs(),
                io.String.Input(
                    "checkpoint", default=BEST, tooltip="best, last, or the number of a step that is kept."
                ),
                io.String.Input(
                    "scorers",
                    default="auto",
                    tooltip="auto: those whose weights are here. Or some of aesthetic, clip, dinov2, hpsv2, pickscore, siglip, vlm-judge, demo. Nothing is downloaded.",
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One prompt per line. Empty: the prompts of the held-out pairs.",
                ),
                io.Int.Input(
                    "count",
                    default=32,
                    min=1,
                    max=10_000,
                    tooltip="At most so many prompts; more take longer and narrow the intervals.",
                ),
                io.Int.Input(
                    "seeds",
                    default=2,
                    min=1,
                    max=64,
                    tooltip="Pictures per prompt; diversity needs two. More take longer.",
                ),
            ],
            outputs=[io.String.Output("report", display_name="report"), io.Image.Output("sheet", display_name="sheet")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name: str, checkpoint: str, **others: object) -> str:
        return newest_state(run_name, checkpoint)

    @classmethod
    def execute(
        cls,
        run_name: str,
        checkpoint: str,
        scorers: str,
        prompts: str,
        count: int,
        seeds: int,
        run: RunDir | None = None,
    ) -> io.NodeOutput:
        chosen = run_of(run_name, run)
        arguments = {
            "run": str(chosen.path),
            "step": step_of(chosen, checkpoint),
            "scorers": scorers.replace(",", " ").split() or ["auto"],
            "prompts": [line.strip() for line in prompts.splitlines() if line.strip()],
            "count": count,
            "seeds": seeds,
        }
        return measured(cls, job("evaluate", arguments, _comfy.Progress(cls.hidden.unique_id)))


class ReferenceMismatch(io.ComfyNode):
    """How far the chosen images are from what the base model draws."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MaPOReferenceMismatch",
            display_name="Reference Mismatch",
            category=CATEGORY,
            description="Measures how far the chosen images are from what the base model draws for their prompts, and suggests a first beta. The suggestion is a heuristic; try the three values that the report names.",
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=_comfy.checkpoint_names(),
                    default=_comfy.DEMO,
                    tooltip="The base model that you will train.",
                ),
                Pairs.Input("pairs", tooltip="The pairs; only the chosen images are looked at."),
                io.Int.Input(
                    "count",
                    default=48,
                    min=2,
                    max=10_000,
                    tooltip="Prompts to draw, twice each; more take longer and narrow the interval.",
                ),
                io.Int.Input(
                    "steps", default=25, min=1, max=200, tooltip="Sampling steps; more take longer and may look better."
                ),
                io.Float.Input(
                    "cfg",
                    default=5.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance: a larger value follows the prompt more closely.",
                ),
                io.Combo.Input(
                    "embedder",
                    options=["auto", "dinov2", "demo"],
                    default="auto",
                    tooltip="What decides how similar two images are. auto: the demo model's own classifier for the demo model, else DINOv2, whose weights must be here.",
                ),
                Settings.Input(
                    "settings", optional=True, tooltip="Training settings; resolution and seed are taken from them."
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report"),
                io.Image.Output("sheet", display_name="sheet"),
                io.Float.Output("beta", display_name="beta"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        pairs: PairSet,
        count: int,
        steps: int,
        cfg: float,
        embedder: str,
        settings: dict | None = None,
    ) -> io.NodeOutput:
        base = {"name": "mismatch", "data": {"pairs": "pairs.jsonl"}}
        folder = new_folder("mismatch")
        write_pairs(folder / "pairs.jsonl", pairs.pairs)
        arguments = {
            "settings": merge_settings(base, settings or {}, {"model": {"path": _comfy.checkpoint_path(checkpoint)}}),
            "pairs": str(folder / "pairs.jsonl"),
            "count": count,
            "num_inference_steps": steps,
            "guidance_scale": cfg,
            "embedder": embedder,
            "sheet": str(folder / "sheet.png"),
        }
        found = {**job("mismatch", arguments, _comfy.Progress(cls.hidden.unique_id)), "sheet": arguments["sheet"]}
        out = measured(cls, found)
        return io.NodeOutput(*out.args, float(found["beta"] or 0), ui=out.ui)


def measured(cls: type[io.ComfyNode], found: dict) -> io.NodeOutput:
    """A measure's text and sheet, in the node and as outputs."""
    sheet = _comfy.to_tensor([Image.open(found["sheet"]).convert("RGB")])
    preview = ui.PreviewImage(sheet, cls=cls).as_dict()
    return io.NodeOutput(found["text"], sheet, ui={**preview, "mapo_text": [found["text"]]})


def new_folder(name: str) -> Path:
    """A new folder below the runs and caches, named by the time."""
    folder = mapo_home() / name / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def numbers(text: str) -> list[float]:
    """The numbers of a text.

    Raises:
        ConfigError: it holds something else, or nothing.
    """
    try:
        found = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of numbers such as 0.5, 1.0.") from None
    if not found:
        raise ConfigError("Give at least one number, for example 1.0.")
    return found


NODES = [Compare, Evaluate, ReferenceMismatch, RunReport]
