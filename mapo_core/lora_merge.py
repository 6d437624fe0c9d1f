"""LoRA files merged into the base model before anything else is done with it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .comfy_weights import comfyui_change
from .components import full_name, parts
from .errors import ModelError
from .lora_file import LoraModule, lora_update, read_lora, read_modules
from .lora_keys import some
from .sections import split_merge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .families.base import DiffusionModel, Family


@torch.no_grad()
def merge_loras(model: DiffusionModel, family: Family, entries: Sequence[str]) -> None:
    """Add each file's change of the weights, times its strength, as ComfyUI's LoRA loader does it.

    What it was made of becomes part of what the caches of prompts are named by. Layers of text encoders that are not
    loaded are left out.

    Args:
        model: without adapter, not quantised.
        family: of the model.
        entries: "path" or "path=strength".

    Raises:
        ExportError: a file is missing or damaged.
        ModelError: a file has layers that the model has not.
    """
    merged: list[Any] = []
    for entry in entries:
        path, strength = split_merge(entry)
        file = read_lora(Path(path).expanduser())
        here = parts(model)
        layers = {
            family.kohya_prefix(name) if file.layout == "kohya" else name: layer
            for part, module in here.items()
            for name, layer in _layers(part, module)
        }
        stored = read_modules(file)
        unknown = stored.keys() - layers.keys()
        if not model.text_encoders:
            unknown = {name for name in unknown if not name.startswith(("lora_te", "text_encoder"))}
        if unknown:
            raise ModelError(
                f"model.merge_loras: {path} does not fit this {family.title} model, which has no layer for "
                f"{some(unknown)}. Choose a LoRA that was trained for it."
            )
        for name in stored.keys() & layers.keys():
            weight = layers[name].weight
            change = comfyui_change(stored[name].weights, stored[name].alpha, weight.float())
            if file.kind == "dora" and file.layout == "diffusers":
                change = _plain_dora(stored[name], weight.float())
            weight.copy_((weight.float() + strength * change).to(weight.dtype))
        merged.append([hashlib.sha256(file.path.read_bytes()).hexdigest(), strength])
    if merged:
        model.extras["merged_loras"] = merged


def _layers(part: str, module: Any) -> list[tuple[str, Any]]:
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return [(full_name(part, path), layer) for path, layer in module.named_modules() if isinstance(layer, kinds)]


def _plain_dora(module: LoraModule, weight: torch.Tensor) -> torch.Tensor:
    """The change by lengths as DoRA means them."""
    changed = weight + lora_update(module, weight.device).reshape(weight.shape)
    lengths = module.weights["dora_scale"].to(weight.device).float() / changed.flatten(1).norm(dim=1)
    return changed * lengths.reshape(-1, *[1] * (weight.ndim - 1)) - weight
