"""Names of LoRA weights: how ComfyUI finds the layer that a kohya key belongs to.

ComfyUI (0.3.64: comfy/lora.py, model_lora_keys_unet; comfy/utils.py, unet_to_diffusers) knows a UNet by its original
(LDM) layer names. For every layer it accepts `lora_unet_` + the diffusers path with underscores, and it works that
path out from the block layout alone. A key outside that list is dropped with a log line. Here the list is stated once
more, so that an export can be held against it without ComfyUI.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

KOHYA = "lora_unet_"
KOHYA_TEXT = {
    "sd15": {"text_encoder": "lora_te_"},
    "sdxl": {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
KOHYA_PREFIXES = (KOHYA, "lora_te_", "lora_te1_", "lora_te2_")
LYCORIS = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
)
KOHYA_SUFFIXES = ("lora_down.weight", "lora_up.weight", "alpha")
_SUFFIXES = {*KOHYA_SUFFIXES, *LYCORIS, "dora_scale"}

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_TRANSFORMER_BLOCK = (
    *(f"{attention}.{part}" for attention in ("attn1", "attn2") for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}


Depth = int | tuple[int, ...]


@dataclass(frozen=True)
class BlockLayout:
    """What the names of a UNet's layers depend on; one entry per resolution, in the order of the forward pass.

    Attributes:
        res_blocks: residual blocks on the way down; on the way up there is one more.
        down_depths: transformer blocks behind each residual block on the way down, 0 for none; a tuple where they
            differ within a resolution, as in SSD-1B.
        middle_depth: the same in the middle.
        up_depths: the same on the way up.
    """

    res_blocks: tuple[int, ...]
    down_depths: tuple[Depth, ...]
    middle_depth: int
    up_depths: tuple[Depth, ...]


PUBLISHED_LAYOUTS = {
    "sdxl": BlockLayout(res_blocks=(2, 2, 2), down_depths=(0, 2, 10), middle_depth=10, up_depths=(10, 2, 0)),
    "sd15": BlockLayout(res_blocks=(2, 2, 2, 2), down_depths=(1, 1, 1, 0), middle_depth=1, up_depths=(0, 1, 1, 1)),
}


def block_layout(unet_config: Any) -> BlockLayout:
    """The layout of a diffusers UNet2DConditionModel, from its `config`."""
    down, up = tuple(unet_config.down_block_types), tuple(unet_config.up_block_types)
    depths = _per_block(unet_config.transformer_layers_per_block, len(down))
    up_depths = _per_block(unet_config.reverse_transformer_layers_per_block or depths[::-1], len(up))
    with_attention = "CrossAttn" in (unet_config.mid_block_type or "")
    layers = unet_config.layers_per_block
    return BlockLayout(
        res_blocks=(layers,) * len(down) if isinstance(layers, int) else tuple(layers),
        down_depths=tuple(d if "CrossAttn" in kind else 0 for d, kind in zip(depths, down, strict=True)),
        middle_depth=_at(depths[-1], -1) if with_attention else 0,
        up_depths=tuple(d if "CrossAttn" in kind else 0 for d, kind in zip(up_depths, up, strict=True)),
    )


def comfyui_names(layout: BlockLayout) -> dict[str, str]:
    """Kohya names that ComfyUI accepts for a UNet of this layout, each with the LDM layer that it goes to."""
    pairs = [*_OUTSIDE_BLOCKS.items(), *_down(layout), *_middle(layout), *_up(layout)]
    return {kohya_name(diffusers): ldm for diffusers, ldm in pairs}


def text_encoder_names(family_name: str) -> list[str]:
    """Kohya names that ComfyUI accepts for text encoders (comfy/lora.py, model_lora_keys_clip): 32 layers at most."""
    parts = [f"self_attn_{p}_proj" for p in "qkv"] + ["self_attn_out_proj", "mlp_fc1", "mlp_fc2"]
    prefixes = KOHYA_TEXT[family_name].values()
    return [f"{p}text_model_encoder_layers_{i}_{name}" for p in prefixes for i in range(32) for name in parts]


def kohya_name(module: str) -> str:
    """`mid_block.attentions.0.proj_in` -> `lora_unet_mid_block_attentions_0_proj_in`."""
    return KOHYA + module.replace(".", "_")


def check_against_naming_rules(keys: Iterable[str], family_name: str, layout: BlockLayout | None = None) -> None:
    """Hold the keys of a kohya file against ComfyUI's rules.

    Args:
        keys: all keys of the file.
        family_name: "sdxl" or "sd15"; names the published layout.
        layout: of a smaller UNet of that family.

    Raises:
        ExportError: names the keys that ComfyUI would drop, and those that it would miss beside the others.
    """
    accepted = {*comfyui_names(layout or PUBLISHED_LAYOUTS[family_name]), *text_encoder_names(family_name)}
    keys = set(keys)
    dropped = [k for k in keys if k.partition(".")[0] not in accepted or k.partition(".")[2] not in _SUFFIXES]
    if dropped:
        raise ExportError(
            f"ComfyUI would not load {some(dropped)}: no such layer in a UNet of family {family_name}. Train other "
            "layers (adapter.targets), or report this: every layer that can be chosen should have a name."
        )
    modules = {k.partition(".")[0] for k in keys}
    lycoris = {k.partition(".")[0] for k in keys if k.partition(".")[2] in LYCORIS}  # complete by `read_lora`'s rules
    wanted = {f"{module}.{suffix}" for module in modules - lycoris for suffix in KOHYA_SUFFIXES}
    missing = (wanted | {f"{module}.alpha" for module in lycoris}) - keys
    if missing:
        raise ExportError(f"The file lacks {some(missing)}. Export the run again: mapo export RUN.")


def some(names: Iterable[str], count: int = 5) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - count} more" if len(ordered) > count else ""
    return ", ".join(ordered[:count]) + more


def _per_block(value: Any, count: int) -> tuple[Depth, ...]:
    return (value,) * count if isinstance(value, int) else tuple(v if isinstance(v, int) else tuple(v) for v in value)


def _at(depth: Depth, i: int) -> int:
    return depth if isinstance(depth, int) else depth[i]


def _down(layout: BlockLayout) -> Iterator[tuple[str, str]]:
    for level, count in enumerate(layout.res_blocks):
        first = 1 + (count + 1) * level
        for i in range(count):
            yield from _resnet(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{first + i}.0")
            depth = _at(layout.down_depths[level], i)
            yield from _transformer(f"down_blocks.{level}.attentions.{i}", f"input_blocks.{first + i}.1", depth)
        if level < len(layout.res_blocks) - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{first + count}.0.op"


def _middle(layout: BlockLayout) -> Iterator[tuple[str, str]]:
    yield from _resnet("mid_block.resnets.0", "middle_block.0")
    yield from _transformer("mid_block.attentions.0", "middle_block.1", layout.middle_depth)
    yield from _resnet("mid_block.resnets.1", "middle_block.2")


def _up(layout: BlockLayout) -> Iterator[tuple[str, str]]:
    for level, count in enumerate(reversed(layout.res_blocks)):
        first, depth = (count + 1) * level, 0
        for i in range(count + 1):
            yield from _resnet(f"up_blocks.{level}.resnets.{i}", f"output_blocks.{first + i}.0")
            depth = _at(layout.up_depths[level], i)
            yield from _transformer(f"up_blocks.{level}.attentions.{i}", f"output_blocks.{first + i}.1", depth)
        if level < len(layout.res_blocks) - 1:
            place = f"output_blocks.{first + count}.{2 if depth else 1}"
            yield f"up_blocks.{level}.upsamplers.0.conv", f"{place}.conv"


def _resnet(diffusers: str, ldm: str) -> Iterator[tuple[str, str]]:
    for name, original in _RESNET.items():
        yield f"{diffusers}.{name}", f"{ldm}.{original}"


def _transformer(diffusers: str, ldm: str, depth: int) -> Iterator[tuple[str, str]]:
    for name in ("proj_in", "proj_out") if depth else ():
        yield f"{diffusers}.{name}", f"{ldm}.{name}"
    for block in range(depth):
        for name in _TRANSFORMER_BLOCK:
            yield f"{diffusers}.transformer_blocks.{block}.{name}", f"{ldm}.transformer_blocks.{block}.{name}"
