"""What ComfyUI's LoRA loader makes of one layer's tensors, stated once more from its rules.

Read from ComfyUI 0.3.64 and 0.33.0: comfy/weight_adapter/lora.py, loha.py, lokr.py and base.py (weight_decompose). An
export is held against it without ComfyUI; `tests/comfyui/test_lora_weights.py` holds this against the real one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .lora_file import rank_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


def comfyui_change(weights: Mapping[str, Tensor], alpha: float | None, weight: Tensor) -> Tensor:
    """What is added to a layer's weight at strength 1, float32, like `weight`.

    Args:
        weights: tensors of one layer under the names of `LoraModule.weights`, as the file has them.
        alpha: of the layer; None where the file has none, which is scale 1.
        weight: the layer's own, float32: [out, in] or [out, in, k, k].
    """
    own = {name: tensor.to(weight.device, torch.float32) for name, tensor in weights.items()}
    if "lora_up" in own:
        update = own["lora_up"].flatten(1) @ own["lora_down"].flatten(1)
    elif "hada_w1_a" in own:
        update = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
    else:
        first, second = (_factor(own, name) for name in ("lokr_w1", "lokr_w2"))
        update = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second)
    whole = "lokr_w1" in own and "lokr_w2" in own  # alpha is not looked at then
    scale = 1.0 if alpha is None or whole else alpha / rank_of({n: tuple(t.shape) for n, t in own.items()})
    change = scale * update.reshape(weight.shape)
    if "dora_scale" not in own:
        return change
    lengths = own["dora_scale"]
    if lengths.shape[0] == weight.shape[0]:  # a length per output; the norm is that of the weight before the change
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    else:
        norm = (weight + change).transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    return (weight + change) * (lengths / (norm + torch.finfo(weight.dtype).eps)) - weight


def _factor(own: Mapping[str, Tensor], name: str) -> Tensor:
    return own[name] if name in own else own[f"{name}_a"] @ own[f"{name}_b"]
