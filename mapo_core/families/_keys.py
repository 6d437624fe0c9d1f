"""Names of tensors: from a module's own to those in files, where LDM, open_clip and older diffusers named them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple


class Piece(NamedTuple):
    """Where a parameter comes from: a tensor of the file, perhaps one third of it, perhaps transposed."""

    key: str
    third: int | None = None
    transposed: bool = False


Naming = Callable[[Iterable[str], Collection[str]], dict[str, Piece]]
"""(names in the module, names in the file) -> where each of the former is."""

# In every complete checkpoint beside the parameters that are used, and never needed.
SPARE = re.compile(
    r"(.*\.)?(position_ids|logit_scale|attn_mask)$"
    r"|(transformer\.)?text_projection(\.weight)?$"  # CLIP-L's, which neither family uses
    r"|(loss|model_ema)\."  # leftovers of a VAE's own training
)


def _choose(available: Collection[str], *candidates: str) -> Piece:
    return Piece(next((c for c in candidates if c in available), candidates[0]))


def same_names(names: Iterable[str], available: Collection[str]) -> dict[str, Piece]:
    """A UNet of a diffusers folder."""
    del available
    return {n: Piece(n) for n in names}


def clip_folder_names(names: Iterable[str], available: Collection[str]) -> dict[str, Piece]:
    """A text encoder of a diffusers folder. Whether names begin with `text_model.` depends on who saved it, and the
    module's own on the version of transformers.
    """
    plain = {n: n.removeprefix("text_model.") for n in names}
    return {n: _choose(available, f"text_model.{p}", p) for n, p in plain.items()}


def vae_folder_names(names: Iterable[str], available: Collection[str]) -> dict[str, Piece]:
    """A VAE of a diffusers folder; before diffusers 0.17 its attention had other names."""
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    found: dict[str, Piece] = {}
    for name in names:
        earlier = name
        for new, before in old.items():
            earlier = earlier.replace(new, before)
        found[name] = _choose(available, name, earlier)
    return found


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_ldm_names(layers_per_block: int) -> Naming:
    """A UNet in a single file, named as in CompVis' latent-diffusion.

    There the blocks are counted through: each level has `layers_per_block` residual blocks and a downsampler on the
    way down, and one residual block more on the way up, the last of which shares its number with the upsampler.
    """
    n = layers_per_block + 1

    def rename(name: str, attention_in_up: set[str]) -> str:
        for ours, theirs in _UNET_ENDS.items():
            if name.startswith(f"{ours}."):
                return theirs + name[len(ours) :]
        if name.startswith("mid_block."):
            _, kind, index, rest = name.split(".", 3)
            at = f"middle_block.{1 if kind == 'attentions' else 2 * int(index)}"
            return f"{at}.{_in_resnet(rest) if kind == 'resnets' else rest}"
        way, level, kind, index, rest = name.split(".", 4)
        i, j = int(level), int(index)
        if kind == "downsamplers":
            return f"input_blocks.{n * (i + 1)}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{n * i + n - 1}.{2 if level in attention_in_up else 1}.{rest}"
        at = f"input_blocks.{n * i + j + 1}" if way == "down_blocks" else f"output_blocks.{n * i + j}"
        return f"{at}.0.{_in_resnet(rest)}" if kind == "resnets" else f"{at}.1.{rest}"

    def names_in_file(names: Iterable[str], available: Collection[str]) -> dict[str, Piece]:
        del available
        names = list(names)
        up = {m.split(".")[1] for m in names if m.startswith("up_blocks.") and ".attentions." in m}
        return {m: Piece(rename(m, up)) for m in names}

    return names_in_file


def _in_resnet(rest: str) -> str:
    layer, tail = rest.split(".", 1)
    return f"{_RESNET[layer]}.{tail}"


def vae_ldm_names(levels: int) -> Naming:
    """A VAE in a single file; `levels` is the number of its resolutions. LDM counts the decoder's from the bottom."""

    def rename(name: str) -> str:
        def down(m: re.Match[str]) -> str:
            return f"encoder.down.{m[1]}."

        def up(m: re.Match[str]) -> str:
            return f"decoder.up.{levels - 1 - int(m[1])}."

        name = re.sub(r"^encoder\.down_blocks\.(\d+)\.", down, name)
        name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", up, name)
        if ".mid_block.attentions." in name:
            for ours, theirs in {
                "to_q": "q",
                "to_k": "k",
                "to_v": "v",
                "to_out.0": "proj_out",
                "group_norm": "norm",
            }.items():
                name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
            return name
        name = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", name)
        name = name.replace("downsamplers.0.", "downsample.").replace("upsamplers.0.", "upsample.")
        name = name.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
        return name.replace("conv_norm_out", "norm_out")

    def names_in_file(names: Iterable[str], available: Collection[str]) -> dict[str, Piece]:
        del available
        return {n: Piece(rename(n)) for n in names}

    return names_in_file


def clip_ldm_names(names: Iterable[str], available: Collection[str]) -> dict[str, Piece]:
    """CLIP-L in a single file, as transformers names it; some old merges leave `text_model.` out."""
    plain = {n: n.removeprefix("text_model.") for n in names}
    return {n: _choose(available, f"transformer.text_model.{p}", f"transformer.{p}") for n, p in plain.items()}


_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_names(names: Iterable[str], available: Collection[str]) -> dict[str, Piece]:
    """CLIP-G in a single file, as open_clip names it: query, key and value in one tensor, the projection transposed."""
    found: dict[str, Piece] = {}
    ends = {
        "embeddings.token_embedding.weight": Piece("token_embedding.weight"),
        "embeddings.position_embedding.weight": Piece("positional_embedding"),
        "final_layer_norm.weight": Piece("ln_final.weight"),
        "final_layer_norm.bias": Piece("ln_final.bias"),
        "text_projection.weight": Piece("text_projection", transposed=True),
    }
    if "text_projection.weight" in available:
        ends["text_projection.weight"] = Piece("text_projection.weight")
    for name in names:
        plain = name.removeprefix("text_model.")
        if plain in ends:
            found[name] = ends[plain]
            continue
        _, _, number, rest = plain.split(".", 3)  # encoder.layers.<number>.<rest>
        layer, tail = rest.rsplit(".", 1)
        block = f"transformer.resblocks.{number}"
        if layer in _OPEN_CLIP_LAYER:
            found[name] = Piece(f"{block}.{_OPEN_CLIP_LAYER[layer]}.{tail}")
        else:
            third = ("q_proj", "k_proj", "v_proj").index(layer.removeprefix("self_attn."))
            found[name] = Piece(f"{block}.attn.in_proj_{tail}", third=third)
    return found
