"""Which layers of a UNet get a LoRA, and what kohya calls them. SDXL and SD 1.5 share the UNet class."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..components import UNET, part_of
from ..lora_keys import KOHYA, KOHYA_TEXT

if TYPE_CHECKING:
    from collections.abc import Sequence

# peft takes a module whose name is one of these or ends with "." and one of these.
_GROUPS = {
    # Self- and cross-attention, and the projections around the transformer blocks.
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    # What kohya's LoCon (conv_dim) adds: all layers of ResnetBlock2D, Downsample2D and Upsample2D. The two together
    # with these are every layer that kohya trains; conv_in, conv_out and the time embeddings are in neither.
    "conv": ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
}


def target_modules(groups: Sequence[str]) -> list[str]:
    """peft `target_modules` for groups among "attention", "feed_forward", "conv"."""
    return [name for group in groups for name in _GROUPS[group]]


def kohya_prefix(module: str, family: str) -> str:
    """The kohya name of a layer, from its full name; ComfyUI and kohya load diffusers' names with underscores."""
    part = part_of(module)
    prefix = KOHYA if part == UNET else KOHYA_TEXT[family][part]
    return prefix + module.removeprefix(f"{part}.").replace(".", "_")
