"""Encode prompts of any length with CLIP text encoders, and stack them for the denoiser."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ._tokens import prompt_windows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from .base import DiffusionModel

_BATCH = 16  # windows encoded at once


def encode_sd15(model: DiffusionModel, prompts: Sequence[str], *, live: bool = False) -> list[dict[str, Tensor]]:
    """The last layer's states after the final norm; with clip skip n, those of n layers before, also normed.

    `live` leaves them on the device, with gradient where it is enabled.
    """
    (encoder,), (tokenizer,) = model.text_encoders, model.tokenizers
    windows = [prompt_windows(tokenizer, p) for p in prompts]
    skip = model.extras["clip_skip"]

    def states(ids: Tensor) -> tuple[Tensor, ...]:
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-(skip + 1)]
        return (_final_norm(encoder)(hidden),)

    encoded = _encode_windows(encoder, [w for prompt in windows for w in prompt], states, live)
    return [{"prompt_embeds": embeds} for (embeds,) in _join(encoded, [len(w) for w in windows])]


def encode_sdxl(model: DiffusionModel, prompts: Sequence[str], *, live: bool = False) -> list[dict[str, Tensor]]:
    """Both encoders' states before their last layer, side by side, and the second's projection of the first window.

    With clip skip n, the states of n layers before; the projection stays. `live` leaves them on the device, with
    gradient where it is enabled.
    """
    counts = [max(len(prompt_windows(t, p)) for t in model.tokenizers) for p in prompts]
    skip = model.extras["clip_skip"]
    parts: list[list[tuple[Tensor, ...]]] = []
    for encoder, tokenizer in zip(model.text_encoders, model.tokenizers, strict=True):
        windows = [w for p, n in zip(prompts, counts, strict=True) for w in prompt_windows(tokenizer, p, n)]

        def states(ids: Tensor, encoder: Any = encoder) -> tuple[Tensor, ...]:
            output = encoder(ids, output_hidden_states=True)
            hidden = output.hidden_states[-(skip + 2)]
            return (hidden, output.text_embeds) if "text_embeds" in output else (hidden,)

        parts.append(_join(_encode_windows(encoder, windows, states, live), counts))
    first, second = parts
    return [
        {"prompt_embeds": torch.cat([states, more], dim=-1), "pooled_prompt_embeds": pooled}  # [T, 2048], [1280]
        for (states,), (more, pooled) in zip(first, second, strict=True)
    ]


def _encode_windows(encoder: nn.Module, windows: list[list[int]], states: Any, live: bool) -> list[tuple[Tensor, ...]]:
    """Per window what `states` gives, float32; on the CPU and without gradient unless `live`."""
    device = next(encoder.parameters()).device
    found: list[tuple[Tensor, ...]] = []
    for i in range(0, len(windows), _BATCH):
        ids = torch.tensor(windows[i : i + _BATCH], device=device)  # [N, 77]
        with torch.set_grad_enabled(live and torch.is_grad_enabled()), torch.autocast(device.type, enabled=False):
            batch = [t.float() if live else t.float().cpu() for t in states(ids)]
        found += [tuple(t[j] for t in batch) for j in range(len(ids))]
    return found


def _join(windows: list[tuple[Tensor, ...]], counts: list[int]) -> list[tuple[Tensor, ...]]:
    """Windows to prompts: states one after another [T, C]; a projection is the first window's."""
    prompts: list[tuple[Tensor, ...]] = []
    start = 0
    for count in counts:
        own = windows[start : start + count]
        prompts.append((torch.cat([w[0] for w in own]), *own[0][1:]))
        start += count
    return prompts


def _final_norm(encoder: Any) -> nn.Module:
    # transformers before 5 keeps it one level deeper
    return getattr(encoder, "text_model", encoder).final_layer_norm


def stack_embeds(embeds: Sequence[Tensor]) -> Tensor:
    """Prompt embeddings [T_i, C] to [B, T, C]; T is the least common multiple, filled by repetition.

    Cross-attention over a repeated prompt is that over the prompt itself, so nothing changes for the shorter ones
    (ComfyUI does the same, comfy/conds.py, CONDCrossAttn).
    """
    length = math.lcm(*(e.shape[0] for e in embeds))
    return torch.stack([e.repeat(length // e.shape[0], 1) for e in embeds])
