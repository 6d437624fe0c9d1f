"""Train LoRA: pairs and settings in, a LoRA that the stock loader lists out."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from PIL import Image

from ..mapo_core import (
    ConfigError,
    MapoError,
    RunError,
    TrainConfig,
    TrainingError,
    build_config,
    checked_name,
    detect,
    merge_settings,
    run_chart,
)
from ..mapo_core.pairs import PairSet, pair_lines, require_scores
from ..mapo_core.runs import (
    RunDir,
    create_run,
    is_locked,
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

GO_ON, USE, ANEW = "go on", "use what is there", "begin anew"
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
                io.Combo.Input(
                    "if_stopped",
                    options=[GO_ON, USE, ANEW],
                    default=GO_ON,
                    tooltip="When the same training was stopped or interrupted before: go on from there, use the LoRA that was saved then, or begin a new run.",
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
    def fingerprint_inputs(cls, **given: Any) -> int:
        """Changes when what the node gave last is not what it would give now: trained on, deleted, or to be gone on."""
        return _RETURNED[widgets(given)].version(given.get("if_stopped") or GO_ON) if widgets(given) in _RETURNED else 0

    @classmethod
    def execute(
        cls,
        checkpoint: str,
        pairs: PairSet,
        name: str,
        seed: int,
        if_stopped: str,
        settings: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        _comfy.require_packages()
        config = build_config(
            merge_settings(
                settings or {},
                {"name": name, "seed": seed, "model": {"path": _comfy.checkpoint_path(checkpoint)}},
                {"data": {"pairs": "pairs.jsonl"}},
            )
        )
        run = find_or_create(config, pairs, if_stopped)
        if needs_training(run, if_stopped):
            refuse_a_second(run)
            detect(config.model.path, config.model.family)
            _comfy.free_vram()
            try:
                train_in_node(run, cls.hidden.unique_id, config.training.steps)
            finally:
                keep_lora(run, name)
        given = {"checkpoint": checkpoint, "name": name, "seed": seed, "if_stopped": if_stopped}
        out = finished(run, name)
        _RETURNED.setdefault(widgets(given), Returned()).note(run)
        return out


class Returned:
    """What a node with certain widget values gave last, so that it runs again only when that has changed."""

    def __init__(self) -> None:
        self._version = 0
        self._run: RunDir | None = None
        self._state = ""

    def note(self, run: RunDir) -> None:
        """This run, in this state, is what was given."""
        self._run, self._state = run, state_of(run)

    def version(self, if_stopped: str) -> int:
        """A number that grows once for each change."""
        if self._run is not None:
            now = state_of(self._run)
            if now != self._state or (if_stopped != USE and now.startswith(_AGAIN)):
                self._version, self._run = self._version + 1, None
        return self._version


_RETURNED: dict[tuple[Any, ...], Returned] = {}


def widgets(given: dict[str, Any]) -> tuple[Any, ...]:
    """The widget values by which a node is known again; linked ones are None."""
    return tuple(given.get(name) for name in ("checkpoint", "name", "seed", "if_stopped"))


def state_of(run: RunDir) -> str:
    """State of a run and of its LoRA file; "gone" if either is."""
    lora = run.export / f"{run.name}.safetensors"
    if not run.config.exists() or not lora.exists():
        return "gone"
    return f"{run_status(run).state} {lora.stat().st_mtime_ns}"


def needs_training(run: RunDir, if_stopped: str) -> bool:
    """Whether a run is to be started or gone on with."""
    state, lora = run_status(run).state, run.export / f"{run.name}.safetensors"
    return state != "finished" and not (if_stopped == USE and state in _AGAIN and lora.exists())


def refuse_a_second(run: RunDir) -> None:
    """Two trainings at once would share the device's memory.

    Raises:
        RunError: another run is being trained.
    """
    busy = next((other for other in list_runs() if other.path != run.path and is_locked(other)), None)
    if busy is not None:
        raise RunError(
            f"Run {busy.name} is being trained. Wait for it, or stop it in the MaPO tab, and press Run again."
        )


def find_or_create(config: TrainConfig, pairs: PairSet, if_stopped: str) -> RunDir:
    """The run of this very request on these very files: a finished one, one to go on with, or a new one."""
    if not pairs.pairs:
        raise ConfigError("There are no pairs to train on. Check the Preference Pairs node.")
    if "chosen_score" in config.method.build("sdxl").needs:
        require_scores(pairs.pairs, config.method.type)
    weights = (Path(path) for path in (config.model.path, config.model.vae) if path and Path(path).is_file())
    images = (f for p in pairs.pairs for f in (p.chosen, p.rejected, p.chosen_mask, p.rejected_mask) if f)
    key = request_key(config.to_json(), pair_lines(pairs.pairs), chain(weights, images))
    known = [(run, run_status(run).state) for run in runs_of_request(key)]
    for run, state in known:
        if state == "finished" and (run.export / f"{run.name}.safetensors").exists():
            return run
    for run, state in known:
        if state in ("running", "paused", "stopping") or (if_stopped != ANEW and state in _AGAIN):
            return run
    run = create_run(config.name, config.to_json(), pair_lines(pairs.pairs))
    remember_request(run, key)
    return run


def keep_lora(run: RunDir, name: str) -> str | None:
    """Put the run's LoRA, if there is one yet, into the loras folder; its name there.

    That of a training that is not finished gets the step into its name, so that no loader mistakes it for the later
    one. The run may have been made under another name, if the request was the same but for it.
    """
    lora, status = run.export / f"{run.name}.safetensors", run_status(run)
    stem = name if status.state == "finished" else f"{name}-{status.step:08d}"
    return _comfy.publish_lora(lora, stem) if lora.exists() else None


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
