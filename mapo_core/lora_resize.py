"""A LoRA of a smaller rank: the best one there is, by singular value decomposition of every layer's update."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .errors import ExportError
from .lora_file import LoraModule

if TYPE_CHECKING:
    from collections.abc import Sequence


@torch.no_grad()
def resize(modules: Sequence[LoraModule], rank: int) -> tuple[list[LoraModule], float]:
    """Every layer with at most `rank`, and the kept share of the norm of all updates together (1 is all of it).

    The update alpha / r * up @ down is decomposed through the two narrow matrices, so that the wide one is never made
    (Eckart-Young: no other update of that rank is nearer). The new alpha is the new rank, scale 1.

    Raises:
        ExportError: the adapter is DoRA, LoHa or LoKr, for which there is no such form.
    """
    kinds = {m.kind for m in modules} - {"lora"}
    if kinds:
        raise ExportError(
            f"A {' or '.join(sorted(kinds))} adapter cannot be written at another rank. Leave export.rank out, or "
            "train with adapter.type lora."
        )
    resized: list[LoraModule] = []
    kept = whole = 0.0
    for module in modules:
        up, down = module.weights["lora_up"], module.weights["lora_down"]
        left, inner_left = torch.linalg.qr(up.double().flatten(1))  # [out, r], [r, r]
        right, inner_right = torch.linalg.qr(down.double().flatten(1).T)  # [in, r], [r, r]
        u, s, vh = torch.linalg.svd(inner_left @ inner_right.T * (module.alpha / module.rank))
        count = min(rank, len(s))
        root = s[:count].sqrt()
        new_up = (left @ u[:, :count] * root).float().reshape(up.shape[0], count, *up.shape[2:])
        new_down = (root[:, None] * (vh[:count] @ right.T)).float().reshape(count, *down.shape[1:])
        weights = {"lora_down": new_down.contiguous(), "lora_up": new_up.contiguous()}
        resized.append(LoraModule(module.name, weights, float(count), module.base))
        kept += s[:count].square().sum().item()
        whole += s.square().sum().item()
    return resized, math.sqrt(kept / whole) if whole else 1.0
