"""What a run has brought: sheets of pictures, and its report."""

from __future__ import annotations

from comfy_api.latest import io, ui
from PIL import Image

from ..mapo_core import ConfigError, run_chart, run_report
from ..mapo_core.runs import JobStoppedError, RunDir, run_job
from . import _comfy
from ._choose import BEST, run_inputs, run_of, step_of
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
        sheet = Image.open(job("compare", arguments, cls.hidden.unique_id)["sheet"]).convert("RGB")
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


def job(name: str, arguments: dict, node_id: str) -> dict:
    """A job in a child process, with the node's progress bar; Cancel ends it."""
    _comfy.require_packages()
    _comfy.free_vram()
    bar, cancelled = _comfy.Progress(node_id), _comfy.InterruptCheck()
    try:
        return run_job(name, arguments, progress=lambda _, done, total: bar.show(done, total), should_stop=cancelled)
    except JobStoppedError:
        raise cancelled.stop or JobStoppedError("Stopped.") from None


NODES = [Compare, RunReport]
