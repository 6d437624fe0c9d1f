"""Recognise a model from what lies on disk: the header of a single file, or the configs of a diffusers folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ._blueprint import BLUEPRINTS, UNET_PREFIX, VAE_PREFIX
from ._header import Header, read_header
from ._locate import locate
from .base import Detected

_TRAINABLE = " or ".join(b.title for b in BLUEPRINTS.values())
_CHECKPOINT = f"Choose a complete {_TRAINABLE} checkpoint."
_BASE = "Choose the checkpoint that it is meant to be used with."

# What else a file may be: a part of a tensor's name, what it then is, and what to do. The first that fits is taken.
_OTHERS = (
    ("lora_down.weight", "a LoRA", _BASE),
    ("lora_up.weight", "a LoRA", _BASE),
    ("lora_A.", "a LoRA", _BASE),
    ("lora.down.weight", "a LoRA", _BASE),
    ("hada_w1", "a LoHa adapter", _BASE),
    ("lokr_w", "a LoKr adapter", _BASE),
    ("control_model.", "a ControlNet", _BASE),
    ("controlnet_", "a ControlNet", _BASE),
    ("motion_modules.", "an AnimateDiff motion module", _BASE),
    ("scaled_fp8", "a quantised checkpoint", "Choose its fp16 or bf16 original."),
    (".scale_weight", "a quantised checkpoint", "Choose its fp16 or bf16 original."),
    ("comfy_quant", "a quantised checkpoint", "Choose its fp16 or bf16 original."),
    (".absmax", "a quantised checkpoint", "Choose its fp16 or bf16 original."),
    ("edm_mean", "an EDM model (Playground 2.5)", _CHECKPOINT),
    ("edm_vpred.", "an EDM model (CosXL)", _CHECKPOINT),
    ("joint_blocks.", "Stable Diffusion 3", _CHECKPOINT),
    ("double_blocks.", "Flux or a model like it", _CHECKPOINT),
    ("clip_txt_mapper", "Stable Cascade", _CHECKPOINT),
    ("emb_params", "a textual inversion embedding", _BASE),
)
# The same for tensor names that say it only if there is nothing of a checkpoint beside them.
_PARTS = (
    ("input_blocks.0.0.weight", "a UNet alone", "Save it together with its text encoders and VAE."),
    ("down_blocks.0.resnets.0.conv1.weight", "a UNet alone", "Choose the diffusers folder that it belongs to."),
    ("decoder.conv_in.weight", "a VAE alone", "Choose a checkpoint, and give this file as model.vae if you want it."),
    ("text_model.encoder.layers.0.", "a text encoder alone", _CHECKPOINT),
    ("transformer.resblocks.0.", "a text encoder alone", _CHECKPOINT),
)


def detect(source: str | Path, family: str = "auto", *, revision: str | None = None) -> Detected:
    """Recognise a single file, a diffusers folder, a Hub id or `demo`. No weights are read.

    Args:
        source: as the user gave it.
        family: name in `FAMILIES` that it must be, or "auto".
        revision: of a Hub id.

    Raises:
        ModelError: nothing is there, it is damaged, or it is no model that can be trained; says what it is instead.
    """
    kind, path = locate(source, revision)
    found = _inspect_file(path) if kind == "single_file" else _inspect_folder(path, kind)
    if family not in {"auto", found.family}:
        raise ModelError(
            f"{source} is {BLUEPRINTS[found.family].title}, not {BLUEPRINTS[family].title}. Set model.family to auto, "
            "or choose another model."
        )
    return found


def _inspect_file(path: Path) -> Detected:
    header = read_header(path)
    family = _family_of_file(path, header)
    v_prediction = "v_pred" in header.tensors or header.metadata.get("modelspec.prediction_type", "") in {
        "v",
        "v_prediction",
    }
    return Detected(
        family=family,
        kind="single_file",
        path=path,
        prediction_type="v_prediction" if v_prediction else None,
        zero_terminal_snr=True if "ztsnr" in header.tensors else None,
    )


def _family_of_file(path: Path, header: Header) -> str:
    names = header.tensors
    for part, what, advice in _OTHERS:
        if any(part in name for name in names):
            raise _wrong(path, what, advice)
    first = names.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if first is None:
        for part, what, advice in _PARTS:
            if any(part in name for name in names):
                raise _wrong(path, what, advice)
        sample = ", ".join(list(names)[:3]) or "no tensor at all"
        raise _wrong(path, f"no checkpoint that is known here (its tensors: {sample})", _CHECKPOINT)
    _check_channels(path, first.shape[1])

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("conditioner.embedders.0.model."):
        raise _wrong(path, "the SDXL refiner", _CHECKPOINT)
    if has("cond_stage_model.model."):
        raise _wrong(path, "Stable Diffusion 2", _CHECKPOINT)
    for blueprint in BLUEPRINTS.values():
        present = [t for t in blueprint.text if has(t.prefix)]
        if len(present) == len(blueprint.text):
            return blueprint.name
        if present:
            missing = next(t for t in blueprint.text if t not in present)
            what = f"{blueprint.title} without {missing.name} ({missing.prefix}*)"
            raise _wrong(path, what, "Save it again with all text encoders.")
    what = "a UNet and a VAE" if has(VAE_PREFIX) else "a UNet alone"
    raise _wrong(path, f"{what} ({_unet_kind(header)}) without text encoders", _CHECKPOINT)


def _check_channels(where: Path, channels: int) -> None:
    if channels == 9:
        raise _wrong(where, "an inpainting model (9 input channels)", "Choose the model that it was made from.")
    if channels != 4:
        raise _wrong(where, f"a model with {channels} input channels (4 are needed)", _CHECKPOINT)


def _unet_kind(header: Header) -> str:
    """The likely family of a UNet, by the width of its cross-attention."""
    widths = {e.shape[1] for name, e in header.tensors.items() if name.endswith("attn2.to_k.weight")}
    kinds = {2048: "of Stable Diffusion XL", 768: "of Stable Diffusion 1", 1024: "of Stable Diffusion 2"}
    kinds[1280] = "of the SDXL refiner"
    width = max(widths, default=0)
    return kinds.get(width, f"of unknown kind, cross-attention width {width}")


def _inspect_folder(folder: Path, kind: str) -> Detected:
    if not (folder / "model_index.json").exists():
        raise ModelError(f"{folder} is not a diffusers model: it has no model_index.json. {_hint(folder)}")
    pipeline = read_json(folder / "model_index.json").get("_class_name")
    unet = read_json(folder / "unet" / "config.json") if (folder / "unet").is_dir() else {}
    family = _family_of_pipeline(folder, pipeline, unet)
    for component in BLUEPRINTS[family].components:
        if not (folder / component).is_dir():
            raise ModelError(f"{folder} is not complete: it has no {component}/. Download or copy it again.")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    return Detected(
        family=family,
        kind=kind,
        path=folder,
        prediction_type=scheduler.get("prediction_type"),
        zero_terminal_snr=scheduler.get("rescale_betas_zero_snr"),
    )


def _family_of_pipeline(folder: Path, pipeline: Any, unet: dict[str, Any]) -> str:
    if "in_channels" in unet:
        _check_channels(folder, unet["in_channels"])
    if pipeline == "StableDiffusionXLPipeline":
        return "sdxl"
    if pipeline == "StableDiffusionPipeline":
        if unet.get("cross_attention_dim") == 1024:
            raise _wrong(folder, "Stable Diffusion 2", _CHECKPOINT)
        return "sd15"
    if pipeline == "StableDiffusionXLImg2ImgPipeline" and unet.get("cross_attention_dim") == 1280:
        raise _wrong(folder, "the SDXL refiner", _CHECKPOINT)
    raise _wrong(folder, f"a {pipeline}", _CHECKPOINT)


def _hint(folder: Path) -> str:
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    if files and (folder / "config.json").exists():
        return "It is one component of a model; give the folder above it."
    if files:
        return f"Give one of its files instead, for example {folder / files[0]}."
    inside = sorted(p.parent.name for p in folder.glob("*/model_index.json"))
    if inside:
        return f"The model may be one level below: {folder / inside[0]}."
    return "Give the folder that holds it."


def _wrong(where: Path, what: str, advice: str) -> ModelError:
    return ModelError(f"{where} is {what}, and only {_TRAINABLE} can be trained. {advice}")


def read_json(path: Path) -> dict[str, Any]:
    """A config file of a model.

    Raises:
        ModelError: it is missing or is not JSON.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror}. Download or copy the model again.") from error
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}). Download or copy the model again.") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} does not hold settings. Download or copy the model again.")
    return values
