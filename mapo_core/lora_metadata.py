"""The header of a LoRA file: `ss_*` as kohya writes it, `modelspec.*` (ModelSpec 1.0.1), and `mapo.*`, our own.

A LoRA is shared publicly: nothing here may tell where on the author's disk something was.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .methods import MaPOConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL import Image

    from .config import TrainConfig
    from .families.base import Family

THUMBNAIL_SIDE = 256  # pixels
_PUBLISHED_ENCODER_LAYER = {"sdxl": 2, "sd15": 1}  # counted from the end, 1 is the last
_MIXED_PRECISION = {"fp32": "no", "auto": None}
_OPTIONS = (
    "label_smoothing",
    "safeguard",
    "safeguard_mu",
)  # of several methods; written where they are not the default


def lora_metadata(
    config: TrainConfig,
    family: Family,
    *,
    steps_done: int,
    pairs_count: int,
    pairs_sha256: str,
    base_model_name: str,
    base_model_hash: str | None = None,
    held_out: Mapping[str, float | None] | None = None,
    thumbnail: Image.Image | None = None,
    started: float | None = None,
    finished: float | None = None,
    precision: str | None = None,
    prediction_type: str = "epsilon",
    resolution: int | None = None,
    version: str | None = None,
) -> dict[str, str]:
    """The header entries of a trained LoRA, all of them text; what is unknown or not finite is left out.

    `export_lora` adds the hashes of the tensors.

    Args:
        config: of the run.
        family: of the base model.
        steps_done: optimizer steps.
        pairs_count: pairs trained on, held-out ones not counted.
        pairs_sha256: hash of the run's `pairs.jsonl`.
        base_model_name: path, Hub id or name; of a path only the last part is written.
        base_model_hash: SHA-256 of the base model's file.
        held_out: measures on the held-out pairs, written as `mapo.held_out_<name>`; for example accuracy (with the
            LoRA), accuracy_base (without), margin, margin_base, pairs.
        thumbnail: a picture made with the LoRA; stored as JPEG of at most 256 pixels.
        started, finished: seconds since 1970.
        precision: of the arithmetic, where the config says "auto".
        prediction_type: "epsilon" or "v_prediction".
        resolution: side of the square bucket, pixels, where the config leaves it open and the model is not a
            published one.
        version: of this program.
    """
    side = config.data.resolution or resolution or family.resolution
    values: dict[str, Any] = {
        **_network(config),
        **_training(config, steps_done, pairs_count, precision or config.training.precision),
        "ss_base_model_version": family.base_model_version,
        "ss_v2": False,
        "ss_sd_model_name": public_name(base_model_name),
        "ss_new_sd_model_hash": base_model_hash,
        "ss_resolution": f"({side}, {side})",
        "ss_training_started_at": started,
        "ss_training_finished_at": finished,
        **_modelspec(config, family, side, prediction_type, finished, version),
        "modelspec.thumbnail": None if thumbnail is None else data_url(thumbnail),
        **_mapo(config, family, pairs_count, pairs_sha256, version),
        **{f"mapo.held_out_{name}": value for name, value in (held_out or {}).items()},
    }
    return {key: str(value) for key, value in values.items() if not _unknown(value)}


def public_name(source: str) -> str:
    """The name of a model without the folder it lies in; a Hub id stays whole."""
    parts = [p for p in re.split(r"[\\/]+", source) if p]
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not Path(source).exists()
    if hub_id and not source.lower().endswith((".safetensors", ".ckpt")):
        return source
    return parts[-1] if parts else ""


def data_url(image: Image.Image) -> str:
    """The picture as `data:image/jpeg;base64,...`, at most 256 pixels on its longer side."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _network(config: TrainConfig) -> dict[str, Any]:
    adapter = config.adapter
    alpha = adapter.rank if adapter.alpha is None else adapter.alpha
    conv = {"conv_dim": str(adapter.rank), "conv_alpha": str(alpha)} if "conv" in adapter.targets else {}
    algorithm = {"dora": {"algo": "locon", "dora_wd": "True"}, "loha": {"algo": "loha"}, "lokr": {"algo": "lokr"}}
    lycoris = algorithm.get(adapter.type, {})
    return {
        "ss_output_name": config.name,
        "ss_network_module": "lycoris.kohya" if lycoris else "networks.lora",
        "ss_network_dim": adapter.rank,
        "ss_network_alpha": alpha,
        "ss_network_dropout": adapter.dropout,
        "ss_network_args": json.dumps({**lycoris, **conv}),
        "ss_training_comment": f"ComfyUI-MaPO, method {config.method.type}",
    }


def _training(config: TrainConfig, steps_done: int, pairs_count: int, precision: str) -> dict[str, Any]:
    training, optimizer, data = config.training, config.optimizer, config.data
    images = pairs_count if config.method.type == "sft" else 2 * pairs_count
    settings = f"betas={optimizer.betas},weight_decay={optimizer.weight_decay},eps={optimizer.eps}"
    return {
        "ss_steps": steps_done,
        "ss_max_train_steps": training.steps,
        "ss_num_train_images": images,
        "ss_num_reg_images": 0,
        "ss_learning_rate": optimizer.learning_rate,
        "ss_unet_lr": optimizer.learning_rate,
        "ss_text_encoder_lr": "None",
        "ss_optimizer": f"{optimizer.type}({settings})",
        "ss_lr_scheduler": optimizer.schedule,
        "ss_lr_warmup_steps": optimizer.warmup_steps,
        "ss_max_grad_norm": optimizer.max_grad_norm,
        "ss_batch_size_per_device": training.train_batch_size,
        "ss_gradient_accumulation_steps": training.gradient_accumulation_steps,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_mixed_precision": _MIXED_PRECISION.get(precision, precision),
        "ss_seed": config.seed,
        "ss_enable_bucket": data.bucket,
        "ss_flip_aug": data.flip,
        "ss_caption_dropout_rate": data.caption_dropout,
        "ss_cache_latents": True,
        "ss_clip_skip": config.model.clip_skip + 1 if config.model.clip_skip else "None",
    }


def _modelspec(
    config: TrainConfig,
    family: Family,
    side: int,
    prediction_type: str,
    finished: float | None,
    version: str | None,
) -> dict[str, Any]:
    date = None if finished is None else datetime.fromtimestamp(int(finished), tz=UTC).isoformat()
    trigger = config.export.trigger or None
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{family.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.implementation_version": None if version is None else f"comfyui-mapo/{version}",
        "modelspec.title": config.name,
        "modelspec.date": date,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": None if trigger is None else f"Use the word {trigger!r} in the prompt.",
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
        "modelspec.encoder_layer": _PUBLISHED_ENCODER_LAYER.get(family.name, 1) + config.model.clip_skip,
    }


def _mapo(
    config: TrainConfig, family: Family, pairs_count: int, pairs_sha256: str, version: str | None
) -> dict[str, Any]:
    method = config.method
    loss: Any = method.build("demo" if config.model.path == "demo" else family.name)
    if isinstance(method, MaPOConfig):
        form = {"parametrisation": method.parametrisation}
        official = {"margin_weight": loss.weight, "link_scale": loss.scale, "logit_scale": loss.gain}
        settings = form | ({"beta": loss.power} if method.parametrisation == "paper" else official)
    else:
        names = [name for name in type(method).model_fields if name != "type" and name not in _OPTIONS]
        settings = {name: getattr(loss, name, getattr(method, name)) for name in names}
    options = {name: info for name, info in type(method).model_fields.items() if name in _OPTIONS}
    settings |= {name: getattr(method, name) for name, info in options.items() if getattr(method, name) != info.default}
    return {
        "mapo.method": method.type,
        **{f"mapo.{name}": value for name, value in settings.items()},
        "mapo.pairs": pairs_count,
        "mapo.pairs_sha256": pairs_sha256,
        "mapo.version": version,
    }


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))
