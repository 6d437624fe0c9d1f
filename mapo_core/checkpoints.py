"""States from which a run goes on exactly: weights, optimizer, learning-rate schedule, loss scaler, position.

The position is the step alone: data order, noise and timesteps are functions of the seed and the step. Everything is
safetensors and JSON; nothing is unpickled.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import RunError
from .runs import checkpoint_step, fault_point, folder_atomic, remove_folder

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .runs import RunDir
    from .sections import CheckpointConfig


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds; tensors are on the CPU and nobody else's.

    Attributes:
        step: optimizer steps done.
        lora: the LoRA's weights that are in use.
        training: the weights that are trained, by their place, where those in use are an average of them; else None.
        tensors, plain: the optimizer's state, split into tensors and JSON values.
        others: what else is restored, as JSON values.
        good: the state to which a diverging run would go back, where that is another one.
    """

    step: int
    lora: dict[str, Tensor]
    training: dict[str, Tensor] | None
    tensors: dict[str, Tensor]
    plain: Any
    others: dict[str, Any]
    good: Snapshot | None = None

    @classmethod
    def of(
        cls,
        step: int,
        lora: dict[str, Tensor],
        training: dict[str, Tensor] | None,
        optimizer: dict[str, Any],
        others: dict[str, Any],
    ) -> Snapshot:
        """From an optimizer's `state_dict()`."""
        return cls(step, lora, training, *_flatten(optimizer), json.loads(json.dumps(others)))

    def optimizer(self) -> dict[str, Any]:
        """The optimizer's `state_dict()`, with tensors of its own: optimizers keep those that they are given."""
        return _unflatten(self.plain, self.tensors)


def save_checkpoint(run: RunDir, snapshot: Snapshot, replace: bool = False) -> Path:
    """Write `checkpoints/step_XXXXXXXX/` in one move.

    Args:
        run: the run folder.
        snapshot: what to write.
        replace: write it even if there is a checkpoint of this step.
    """
    path = run.checkpoint_path(snapshot.step)
    if path.exists() and not replace:
        return path
    with folder_atomic(path) as folder:
        _write(snapshot, folder)
    return path


def _write(snapshot: Snapshot, folder: Path) -> None:
    save_file({k: v.contiguous() for k, v in snapshot.lora.items()}, folder / "lora.safetensors")
    fault_point("checkpoint:lora")
    if snapshot.training is not None:
        save_file(snapshot.training, folder / "training.safetensors")
    save_file(snapshot.tensors, folder / "optimizer.safetensors")
    fault_point("checkpoint:optimizer")
    state = {"step": snapshot.step, "optimizer": snapshot.plain, **snapshot.others}
    (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    if snapshot.good is not None:
        (folder / "good").mkdir()
        _write(snapshot.good, folder / "good")


def drop_old(run: RunDir, config: CheckpointConfig, measured: dict[int, tuple[float, float]]) -> list[int]:
    """Remove the checkpoints that the settings do not keep; their steps.

    Kept are the newest `keep`, every multiple of `keep_every`, and with `keep_best` the best of those measured.

    Args:
        run: the run folder.
        config: what to keep.
        measured: step -> held-out accuracy and margin, of the steps that were measured.
    """
    steps = [checkpoint_step(path) for path in run.list_checkpoints()]
    keep = set(steps[-config.keep :])
    if config.keep_every:
        keep |= {s for s in steps if s and s % config.keep_every == 0}
    if config.keep_best and (known := [s for s in steps if s in measured]):
        keep.add(max(known, key=lambda s: (*measured[s], s)))
    dropped = [s for s in steps if s not in keep]
    for step in dropped:
        remove_folder(run.checkpoint_path(step))
    return dropped


def drop_after(run: RunDir, step: int) -> None:
    """Remove the checkpoints above a step, the newest first; a run that goes back leaves nothing above it."""
    for path in reversed(run.list_checkpoints()):
        if checkpoint_step(path) > step:
            remove_folder(path)


def load_checkpoint(path: Path) -> Snapshot:
    """What was saved.

    Raises:
        RunError: a file of the checkpoint is missing or damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        lora = load_file(path / "lora.safetensors")
        training = load_file(path / "training.safetensors") if (path / "training.safetensors").exists() else None
        tensors = load_file(path / "optimizer.safetensors")
        good = load_checkpoint(path / "good") if (path / "good").exists() else None
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(
            f"The checkpoint {path} is damaged ({error}). Delete this folder and resume: the one before it is used."
        ) from error
    return Snapshot(state.pop("step"), lora, training, tensors, state.pop("optimizer"), state, good)


def _flatten(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer state into named tensors and a JSON skeleton that refers to them."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {"$tensor": name}
        if isinstance(value, dict):
            return {"$dict": [[k, walk(v, f"{name}.{k}")] for k, v in value.items()]}
        if isinstance(value, list | tuple):
            items = [walk(v, f"{name}.{i}") for i, v in enumerate(value)]
            return {"$tuple": items} if isinstance(value, tuple) else items
        return value

    return tensors, walk(state, "o")


def _unflatten(plain: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(plain, list):
        return [_unflatten(v, tensors) for v in plain]
    if isinstance(plain, dict):
        if "$tensor" in plain:
            return tensors[plain["$tensor"]].clone()
        if "$tuple" in plain:
            return tuple(_unflatten(v, tensors) for v in plain["$tuple"])
        return {k: _unflatten(v, tensors) for k, v in plain["$dict"]}
    return plain
