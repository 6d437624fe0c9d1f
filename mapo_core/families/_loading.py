"""Load a base model of any family: the one way from a `ModelConfig` to a `DiffusionModel`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

from ..errors import ModelError
from ._components import Component, components_of_file, components_of_folder, external_vae, fingerprint
from ._schedulers import build_schedulers
from ._tokens import load_tokenizers
from ._weights import Weights, build
from .base import Detected, DiffusionModel
from .detect import detect, read_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from ..sections import ModelConfig
    from ._blueprint import Blueprint


def load_model(
    blueprint: Blueprint,
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    encoders: bool = True,
) -> DiffusionModel:
    """Load a model; UNet and text encoders in `dtype` (default float32), the VAE always in float32.

    Args:
        blueprint: of the family that it must be.
        config: which model, and what is set by hand.
        device: of all modules.
        dtype: of UNet and text encoders.
        encoders: False leaves VAE and text encoders out; the fingerprint is the same.

    Raises:
        ModelError: the model is missing, incomplete, damaged or of another family.
    """
    precision = dtype or torch.float32
    found = detect(config.path, blueprint.name, revision=config.revision)
    components = _components(blueprint, found, config)
    vae, texts = components["vae"], [components[t.name] for t in blueprint.text]
    tokenizers = load_tokenizers(found)
    _check_vocabulary(tokenizers, texts, config.path)
    latent_scale = 2 ** (len(vae.config["block_out_channels"]) - 1)
    prediction_type, zero_terminal_snr = _prediction(found, config)
    training, sampling = build_schedulers(_schedule(blueprint, found), prediction_type, zero_terminal_snr)
    model = DiffusionModel(
        family=blueprint.name,
        unet=_build(components["unet"], _unet, precision, device),
        vae=_build(vae, _vae, torch.float32, device) if encoders else None,
        text_encoders=[
            _build(part, _text(t.class_name), precision, device)
            for part, t in zip(texts, blueprint.text, strict=True)
            if encoders
        ],
        tokenizers=tokenizers,
        noise_scheduler=training,
        sampling_scheduler=sampling,
        prediction_type=prediction_type,
        fingerprint=fingerprint([vae, *texts]),
        resolution=_resolution(components["unet"].config, latent_scale, blueprint.resolution),
        latent_scale=latent_scale,
        source=config.path,
        # What prompt embeddings depend on beside the weights.
        extras={"clip_skip": config.clip_skip, "text_encoder_dtype": str(precision).removeprefix("torch.")},
    )
    if config.merge_loras:
        from ..lora_merge import merge_loras
        from . import FAMILIES

        merge_loras(model, FAMILIES[blueprint.name], config.merge_loras)
    return model


def _components(blueprint: Blueprint, found: Detected, config: ModelConfig) -> dict[str, Component]:
    assert found.path is not None
    if found.kind == "single_file":
        components = components_of_file(blueprint, found.path)
    else:
        components = components_of_folder(blueprint, found, config)
    if config.vae:
        components["vae"] = external_vae(blueprint, config.vae)
    if "vae" not in components:
        raise ModelError(f"{config.path} has no VAE. Give one as model.vae, for example a .safetensors file.")
    for text in blueprint.text:
        layers = components[text.name].config["num_hidden_layers"]
        if config.clip_skip > layers - 2:
            raise ModelError(f"model.clip_skip is {config.clip_skip}, but {text.name} has {layers} layers. Lower it.")
    return components


def _prediction(found: Detected, config: ModelConfig) -> tuple[str, bool]:
    """What is set by hand wins, then what the file or folder says, then the published models' epsilon."""
    by_hand = None if config.prediction_type == "auto" else config.prediction_type
    prediction_type = by_hand or found.prediction_type or "epsilon"
    if prediction_type not in {"epsilon", "v_prediction"}:
        raise ModelError(
            f'{config.path} predicts "{prediction_type}", which cannot be trained here. If its scheduler is set '
            "wrongly, set model.prediction_type."
        )
    zero_terminal_snr = config.zero_terminal_snr
    return prediction_type, bool(found.zero_terminal_snr if zero_terminal_snr is None else zero_terminal_snr)


def _schedule(blueprint: Blueprint, found: Detected) -> dict[str, Any]:
    assert found.path is not None
    folder = blueprint.configs if found.kind == "single_file" else found.path
    return read_json(folder / "scheduler" / "scheduler_config.json")


def _resolution(unet: dict[str, Any], latent_scale: int, published: int) -> int:
    size = unet.get("sample_size")
    return size * latent_scale if isinstance(size, int) else published


def _check_vocabulary(tokenizers: list[Any], texts: list[Component], source: str) -> None:
    for tokenizer, text in zip(tokenizers, texts, strict=True):
        size, window = text.config["vocab_size"], text.config["max_position_embeddings"]
        if len(tokenizer) > size or tokenizer.model_max_length > window:
            raise ModelError(
                f"{source}: the tokenizer has {len(tokenizer)} tokens in windows of {tokenizer.model_max_length}, "
                f"{text.what} {size} in windows of {window}. They do not belong together; download the model again."
            )


def _build(
    component: Component, make: Callable[[dict[str, Any]], nn.Module], dtype: torch.dtype, device: torch.device | str
) -> Any:
    weights = Weights(component.files, component.prefix)
    return build(lambda: make(component.config), weights, component.naming, component.what, dtype=dtype, device=device)


def _unet(config: dict[str, Any]) -> nn.Module:
    return UNet2DConditionModel.from_config(config)  # pyright: ignore[reportReturnType]


def _vae(config: dict[str, Any]) -> nn.Module:
    return AutoencoderKL.from_config(config)  # pyright: ignore[reportReturnType]


def _text(class_name: str) -> Callable[[dict[str, Any]], nn.Module]:
    def make(config: dict[str, Any]) -> nn.Module:
        return getattr(transformers, class_name)(transformers.CLIPTextConfig.from_dict(config))

    return make
