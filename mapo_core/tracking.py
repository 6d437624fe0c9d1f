"""TensorBoard and Weights & Biases beside events.jsonl, through accelerate's trackers, for those who chose them.

Neither is required, imported or contacted unless `tracking.trackers` names it. Only the main process tracks.
"""

from __future__ import annotations

import json
import logging
import uuid
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .errors import ConfigError
from .runs import checkpoint_step, write_atomic

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import TrainConfig
    from .runs import RunDir

logger = logging.getLogger(__name__)

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any one of them is enough


def require_trackers(config: TrainConfig) -> None:
    """Refuse trackers that are not installed.

    Raises:
        ConfigError: names them, and the command that installs them.
    """
    missing = [t for t in config.tracking.trackers if all(find_spec(name) is None for name in PACKAGES[t])]
    if missing:
        names = " ".join(missing)
        raise ConfigError(
            f"tracking.trackers names {' and '.join(missing)}, which this Python does not have. Install with "
            f"`pip install {names}` in the environment that trains, or leave tracking.trackers empty."
        )


class Tracking:
    """What a run tells its trackers: the numbers of its events, under their steps."""

    def __init__(self, run: RunDir, trackers: list[Any]) -> None:
        """Tell these started trackers of accelerate about `run`."""
        self._run = run
        self._trackers = trackers

    def note(self, type_: str, step: int, fields: dict[str, Any]) -> list[str]:
        """Pass an event on, if it is one of those that are tracked.

        A tracker that fails is told nothing more: the run goes on, and events.jsonl has everything.

        Returns:
            What went wrong, one sentence per tracker that failed.
        """
        if type_ not in ("step", "evaluated", "sample_saved"):
            return []
        problems: list[str] = []
        for tracker in list(self._trackers):
            try:
                if type_ == "sample_saved":
                    self._log_sheet(tracker, step, fields["path"])
                else:
                    _log_numbers(tracker, step, numbers(type_, fields))
            except Exception as error:
                logger.exception("The tracker %s failed", tracker.name)
                self._trackers.remove(tracker)
                problems.append(
                    f"{tracker.name} failed at step {step} and gets nothing more of this run: {error}. "
                    "events.jsonl has all numbers; resume starts the tracker again."
                )
        return problems

    def end(self) -> None:
        """Tell the trackers that the run ended well.

        After a failure this is not called: wandb then learns of it from the exit code of the process.
        """
        for tracker in self._trackers:  # not accelerate's end_training, which also ends the group of processes
            try:
                tracker.finish()
            except Exception:
                logger.exception("The tracker %s did not end well", tracker.name)

    def _log_sheet(self, tracker: Any, step: int, path: str) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(self._run.path / path) as picture:
            sheet = np.asarray(picture.convert("RGB"))[None]  # [1, H, W, 3]
        if tracker.name == "tensorboard":
            tracker.log_images({"samples": sheet}, step=step, dataformats="NHWC")
        else:
            wandb = import_module("wandb")  # no requirement of this project: it is there because someone chose it
            tracker.log({"step": step, "samples": [wandb.Image(image) for image in sheet]})


def start_tracking(accelerator: Accelerator, run: RunDir, config: TrainConfig) -> Tracking | None:
    """Start the chosen trackers of an accelerator that was built with them; None where none is chosen.

    A run that is resumed goes on in its own tracks: TensorBoard forgets the steps after the checkpoint, and the run at
    wandb is found again by the id in `tracking/wandb_id`.

    Raises:
        ConfigError: a tracker does not start.
    """
    chosen = config.tracking.trackers
    if not chosen:
        return None
    newest = run.latest_checkpoint()
    run.tracking.mkdir(exist_ok=True)
    settings: dict[str, dict[str, Any]] = {}
    if "tensorboard" in chosen and (run.tracking / config.tracking.project).exists():
        settings["tensorboard"] = {"purge_step": checkpoint_step(newest) + 1 if newest else 0}
    if "wandb" in chosen:
        settings["wandb"] = {
            "id": _wandb_id(run),
            "name": run.name,
            "resume": "allow",
            "dir": str(run.tracking),
        }
    try:
        accelerator.init_trackers(config.tracking.project, None if newest else flat_settings(config), settings)
        if "wandb" in chosen:
            # wandb drops values below its highest step, so the step is a value of its own and the axis of all others.
            tracked: Any = accelerator.get_tracker("wandb", unwrap=True)
            tracked.define_metric("step")
            tracked.define_metric("*", step_metric="step")
    except Exception as error:
        hint = " For wandb, `wandb login` once, or set WANDB_MODE=offline." if "wandb" in chosen else ""
        raise ConfigError(
            f"tracking.trackers: {' and '.join(chosen)} could not start: {error}.{hint} Or leave tracking.trackers "
            "empty."
        ) from error
    return Tracking(run, list(accelerator.trackers))


def numbers(type_: str, fields: dict[str, Any]) -> dict[str, float]:
    """The numbers of a "step" or "evaluated" event by the names under which they are tracked."""
    if type_ == "step":
        return _prefixed("train", {name: value for name, value in fields.items() if name != "steps"})
    base = fields.get("base") or {}
    return {**_prefixed("held_out", fields), **_prefixed("held_out_base", base)}


def flat_settings(config: TrainConfig) -> dict[str, bool | int | float | str]:
    """The settings as trackers take them: "optimizer.learning_rate", lists as JSON, without those that are None."""
    found: dict[str, bool | int | float | str] = {}

    def add(place: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                add(f"{place}.{name}" if place else name, inner)
        elif value is not None:
            found[place] = value if isinstance(value, bool | int | float | str) else json.dumps(value)

    add("", config.model_dump(mode="json"))
    return found


def _log_numbers(tracker: Any, step: int, values: dict[str, float]) -> None:
    if tracker.name == "wandb":
        tracker.log({"step": step, **values})
    else:
        tracker.log(values, step=step)


def _prefixed(prefix: str, fields: dict[str, Any]) -> dict[str, float]:
    return {
        f"{prefix}/{name}": value
        for name, value in fields.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _wandb_id(run: RunDir) -> str:
    """The run's id at wandb, made once; not its name, which another run may have had before."""
    path = run.tracking / "wandb_id"
    if not path.exists():
        write_atomic(path, uuid.uuid4().hex.encode("ascii"))
    return path.read_text(encoding="ascii").strip()
