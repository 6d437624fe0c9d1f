"""HPSv2.1: human preference score.

Wu et al.: *Human Preference Score v2*, 2023, arXiv 2306.09341. An open_clip ViT-H/14 trained on human choices; the
score is the cosine. As in the authors' code, a picture is brought to 224 pixels on its longer side and filled up
with black.

The authors publish a pickle whose hash is not known here for certain. Take a safetensors form of it (ModelScope's
DiffSynth-Studio/QualityMetric_reward_pretrained has one), or give the hash of the file that you trust.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..errors import ModelError
from ..families._quiet import quiet_import_notices
from .weights import WeightSource, find_weights, load_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from .clip_model import CLIP
    from .scorers import ScorerOptions

_FILE = "HPS_v2.1_compressed.pt"
SOURCES = (WeightSource("hpsv2", "xswu/HPSv2", (f"{_FILE}|*.safetensors",), "2 GB"),)
_VISION_HEAD, _TEXT_HEAD = 80, 64  # width of an attention head of ViT-H/14

_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_VISION = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
_TEXT = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}


class HPSv2:
    """The cosine of picture and prompt."""

    name = "hpsv2"
    title = "HPSv2.1"

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], about 0.2-0.35."""
        return self._clip.cosines(images, prompts).tolist()


def load(name: str, options: ScorerOptions) -> HPSv2:
    """The scorer.

    Raises:
        MissingWeightsError: the weights are not here.
        ModelError: they are a pickle of unknown hash, or not the model.
    """
    quiet_import_notices()
    source = SOURCES[0]
    folder = find_weights(source, options.folders.get(source.name), options.download)
    path = next(iter(sorted(folder.glob("*.safetensors"))), folder / _FILE)
    from ..devices import preferred_device
    from .clip_model import CLIP

    device = preferred_device(options.device)
    model = clip_from_open_clip(load_tensors(path, options.sha256), path)
    return HPSv2(CLIP(model.to(device).eval().requires_grad_(False), device, "pad"))


def clip_from_open_clip(tensors: dict[str, Tensor], path: Path) -> Any:
    """A transformers CLIPModel with the weights of an open_clip one; the sizes are read off the tensors.

    Raises:
        ModelError: tensors are missing or left over.
    """
    from transformers import CLIPConfig, CLIPModel

    tensors = {key.removeprefix("module."): value.float() for key, value in tensors.items()}
    try:
        config = CLIPConfig(**_sizes(tensors))
        renamed = _renamed(tensors)
    except KeyError as error:
        raise ModelError(f"{path} is not an open_clip model: it lacks {error}. Download it again.") from error
    model = CLIPModel(config)
    found = model.load_state_dict(renamed, strict=False)
    lacking = [k for k in found.missing_keys if not k.endswith("position_ids")]
    if lacking or found.unexpected_keys:
        odd = ", ".join([*lacking, *found.unexpected_keys][:3])
        raise ModelError(f"{path} does not fit a CLIP model (for example {odd}). Download it again.")
    return model


def _sizes(tensors: dict[str, Tensor]) -> dict[str, Any]:
    conv, token = tensors["visual.conv1.weight"], tensors["token_embedding.weight"]
    places = tensors["visual.positional_embedding"].shape[0] - 1
    patch = conv.shape[-1]
    vision = {
        "hidden_size": conv.shape[0],
        "intermediate_size": tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _blocks(tensors, "visual.transformer.resblocks."),
        "num_attention_heads": max(1, conv.shape[0] // _VISION_HEAD),
        "patch_size": patch,
        "image_size": round(places**0.5) * patch,
        "hidden_act": "gelu",
    }
    text = {
        "vocab_size": token.shape[0],
        "hidden_size": token.shape[1],
        "intermediate_size": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": _blocks(tensors, "transformer.resblocks."),
        "num_attention_heads": max(1, token.shape[1] // _TEXT_HEAD),
        "max_position_embeddings": tensors["positional_embedding"].shape[0],
        "hidden_act": "gelu",
        "bos_token_id": token.shape[0] - 2,
        "eos_token_id": token.shape[0] - 1,
    }
    return {"vision_config": vision, "text_config": text, "projection_dim": tensors["text_projection"].shape[1]}


def _blocks(tensors: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].partition(".")[0]) for key in tensors if key.startswith(prefix))


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {**_VISION, **_TEXT}
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key in ("text_projection", "visual.proj"):  # open_clip multiplies from the other side
            name = "text_projection.weight" if key == "text_projection" else "visual_projection.weight"
            found[name] = value.T.contiguous()
        elif match := re.fullmatch(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)", key):
            place = f"{'vision_model' if match[1] else 'text_model'}.encoder.layers.{match[2]}"
            part = match[3]
            if part.startswith("attn.in_proj_"):
                for one, tensor in zip(("q_proj", "k_proj", "v_proj"), value.chunk(3), strict=True):
                    found[f"{place}.self_attn.{one}.{part.removeprefix('attn.in_proj_')}"] = tensor
            else:
                stem, _, kind = part.rpartition(".")
                found[f"{place}.{_BLOCK.get(stem, stem)}.{kind}"] = value
        elif key != "attn_mask":
            found[names.get(key, key)] = value.reshape(()) if key == "logit_scale" else value
    return found
