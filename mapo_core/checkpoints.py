"""States from which a run goes on exactly: LoRA, optimizer, learning-rate schedule, loss scaler, position.

The position is the step alone: data order, noise and timesteps are functions of the seed and the step. Everything is
safetensors and JSON; nothing is unpickled.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import RunError
from .runs import fault_point, folder_atomic, remove_folder

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from .runs import RunDir


def save_checkpoint(
    run: RunDir, step: int, lora: dict[str, Tensor], optimizer: dict[str, Any], others: dict[str, Any], keep: int
) -> Path:
    """Write `checkpoints/step_XXXXXXXX/` in one move, then drop all but the newest `keep`.

    Args:
        run: the run folder.
        step: optimizer steps done.
        lora: the LoRA's weights.
        optimizer: its `state_dict()`.
        others: what else is restored, as JSON values.
        keep: checkpoints to keep.
    """
    path = run.checkpoint_path(step)
    if path.exists():
        return path
    tensors, plain = _flatten(optimizer)
    with folder_atomic(path) as folder:
        save_file({k: v.cpu().contiguous() for k, v in lora.items()}, folder / "lora.safetensors")
        fault_point("checkpoint:lora")
        save_file(tensors, folder / "optimizer.safetensors")
        fault_point("checkpoint:optimizer")
        state = {"step": step, "optimizer": plain, **others}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in run.list_checkpoints()[:-keep]:
        remove_folder(old)
    return path


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The LoRA, the optimizer's `state_dict()`, and the rest, as they were saved.

    Raises:
        RunError: a file of the checkpoint is missing or damaged.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        lora = load_file(path / "lora.safetensors")
        tensors = load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(
            f"The checkpoint {path} is damaged ({error}). Delete this folder and resume: the one before it is used."
        ) from error
    return lora, _unflatten(state.pop("optimizer"), tensors), state


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
            return tensors[plain["$tensor"]]
        if "$tuple" in plain:
            return tuple(_unflatten(v, tensors) for v in plain["$tuple"])
        return {k: _unflatten(v, tensors) for k, v in plain["$dict"]}
    return plain
