"""The proof that a LoRA file holds the live adapter.

Five steps, each of which has failed in practice: every key belongs to a layer and every layer is there; the stored
weights are the live ones at the stored precision; ComfyUI's arithmetic on the file gives the change that the live
adapter makes to every weight (kohya layout); diffusers' loader, or peft's where diffusers has none, arrives at the same
weights and scales; and the model predicts with the file what it predicts with the live adapter.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .comfy_weights import comfyui_change
from .components import UNET, parts
from .errors import ExportError
from .lora_adapter import (
    adapted_layers,
    attach,
    by_module,
    detach,
    layer_parameters,
    live_modules,
    set_active,
    undisturbed,
)
from .lora_file import (
    DTYPES,
    LoraFile,
    LoraModule,
    expected_keys,
    file_keys,
    read_lora,
    read_modules,
    stored_form,
    with_comfyui_lengths,
)
from .lora_keys import KOHYA_PREFIXES, block_layout, check_against_naming_rules, some

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .families.base import DiffusionModel, Family

_CHECK = "mapo_export_check"
_LATENT_SIDE = 16
_TOKENS = 8


@dataclass(frozen=True)
class Verification:
    """How far the model with the file is from the model with the live adapter, on one small fixed input.

    Attributes:
        max_abs_difference: of the two predictions.
        relative_difference: root mean square of that difference over that of the adapter's own effect (prediction
            with the adapter minus the base model's); 0 where both are 0.
        arithmetic_difference: largest difference to the prediction with the live weights rounded as the file rounds
            them, in which only the arithmetic's own error is left.
    """

    max_abs_difference: float
    relative_difference: float
    arithmetic_difference: float


def verify_lora(model: DiffusionModel, family: Family, path: Path, *, adapter_name: str = "default") -> Verification:
    """Prove that a file holds the live adapter; the model is as before when this returns or raises.

    Raises:
        ExportError: names the keys or layers in which the file differs, or says how far the predictions are apart.
    """
    live = {m.name: m for m in live_modules(model, adapter_name)}
    _check_keys(model, family, path, live)
    file = read_lora(path)
    stored = by_module(read_modules(file), family, live)
    _check_weights(file, live, stored)
    if file.layout == "kohya":
        _check_arithmetic(model, path, live, stored, adapter_name)
    plain = {n: _plain(file, live[n], m) for n, m in stored.items()}
    rounding = _rounded_parameters(model, live, plain, adapter_name)
    with undisturbed(model):
        base = {part: _output(model, part, []) for part in rounding}
        trained = {part: _output(model, part, [adapter_name]) for part in rounding}
        rounded = {part: _output(model, part, [adapter_name], rounding[part]) for part in rounding}
        try:
            attach(model, family, file, plain, _CHECK)
            loaded = {part: _output(model, part, [_CHECK]) for part in rounding}
        finally:
            set_active(model, [adapter_name])
            detach(model, _CHECK)
    eps = torch.finfo(next(iter(stored.values())).dtype).eps
    found = [
        compare_predictions(
            *(path.name, base[part], trained[part], rounded[part], loaded[part]),
            compute_eps=_arithmetic_eps(parts(model)[part]),
            storage_eps=eps,
        )
        for part in rounding
    ]
    return Verification(*(max(values) for values in zip(*(astuple(f) for f in found), strict=True)))


def _plain(file: LoraFile, live: LoraModule, stored: LoraModule) -> LoraModule:
    """With DoRA's lengths as the model has them."""
    module = LoraModule(live.name, stored.weights, stored.alpha, live.base)
    return with_comfyui_lengths(module, back=True) if file.kind == "dora" and file.layout == "kohya" else module


def compare_predictions(
    name: str, base: Tensor, trained: Tensor, rounded: Tensor, loaded: Tensor, compute_eps: float, storage_eps: float
) -> Verification:
    """Hold predictions of one shape against what the precisions of arithmetic and file allow.

    With the same rounded weights the two models do the same arithmetic: only its own error is allowed. Against the
    live weights the adapter's effect may in addition differ by some units of the stored precision.

    Args:
        name: of the file, for the message.
        base: without adapter.
        trained: with the live adapter.
        rounded: with the live adapter rounded as the file is.
        loaded: with the file.
        compute_eps, storage_eps: relative spacing of numbers in the arithmetic and in the file.

    Raises:
        ExportError: a difference is larger, or a prediction is not finite.
    """
    floor = 8 * compute_eps * _rms(trained)
    effect, difference, left_over = _rms(trained - base), _rms(loaded - trained), _rms(loaded - rounded)
    if not left_over <= floor + 1e-4 * effect:  # also where one of them is not a number
        raise ExportError(
            f"The model with {name} does not predict what the trained one predicts: {left_over:.2g} apart, where "
            f"{floor + 1e-4 * effect:.2g} is expected. Please report this with the versions of torch, diffusers and "
            "peft."
        )
    if not difference <= floor + 8 * storage_eps * effect:
        raise ExportError(
            f"The stored precision loses {difference / effect:.1%} of what {name} does to a prediction: its weights "
            "are too small or too large for it. Set export.precision to bf16 or fp32, then: mapo export RUN."
        )
    relative = difference / effect if effect else float(difference > 0)
    return Verification((loaded - trained).abs().max().item(), relative, (loaded - rounded).abs().max().item())


def _check_keys(model: DiffusionModel, family: Family, path: Path, live: Mapping[str, LoraModule]) -> None:
    keys = file_keys(path)
    kohya = any(k.startswith(KOHYA_PREFIXES) for k in keys)
    expected: set[str] = set()
    for module in live.values():
        expected |= expected_keys(module, "kohya" if kohya else "diffusers", family.kohya_prefix)
    faults = {"lacks": expected - keys, "has in excess": keys - expected}
    problems = [f"{label} {some(odd)}" for label, odd in faults.items() if odd]
    if problems:
        raise ExportError(f"{path.name} {' and '.join(problems)}. Export the run again: mapo export RUN.")
    if kohya:
        check_against_naming_rules(keys, family.name, block_layout(model.unet.config))


def _check_weights(file: LoraFile, live: Mapping[str, LoraModule], stored: Mapping[str, LoraModule]) -> None:
    """Bit for bit: the file has the live weights at its own precision and scale."""
    for name, module in live.items():
        found = stored[name]
        if found.dtype not in DTYPES.values():
            raise ExportError(f"{file.path.name} has {found.name} as {found.dtype}, which no program here writes.")
        expected = stored_form(module, found.alpha, found.dtype)
        if expected.kind == "dora" and file.layout == "kohya":
            expected = with_comfyui_lengths(expected)
        for part, weights in expected.weights.items():
            if part == "dora_scale":
                same = torch.allclose(weights.flatten(), found.weights[part].float().flatten(), rtol=1e-5, atol=0)
            else:
                same = torch.equal(weights, found.weights[part])
            if not same:
                raise ExportError(
                    f"{file.path.name}: the {part.removeprefix('lora_')} weights of {found.name} (alpha "
                    f"{found.alpha:g}) are not the trained ones. Export the run again: mapo export RUN."
                )


@torch.no_grad()
def _check_arithmetic(
    model: DiffusionModel,
    path: Path,
    live: Mapping[str, LoraModule],
    stored: Mapping[str, LoraModule],
    adapter_name: str,
) -> None:
    """ComfyUI's arithmetic on the file against what peft's own layer makes of the rounded weights."""
    for name, layer in adapted_layers(model, adapter_name).items():
        base = live[name].base
        assert base is not None
        weight = base()
        found = comfyui_change(stored[name].weights, stored[name].alpha, weight)
        expected = live_change(layer, adapter_name, weight, _back_in_place(live[name], stored[name]))
        apart, size = _rms(found - expected), _rms(expected)
        if not apart <= 1e-4 * size + 1e-6 * _rms(weight) * (live[name].kind == "dora"):
            raise ExportError(
                f"ComfyUI would change {name} by {apart / size if size else apart:.2g} of the change otherwise than "
                f"the trained adapter with {path.name}. Please report this with adapter.type and the versions of torch "
                "and peft."
            )


def _back_in_place(live: LoraModule, stored: LoraModule) -> dict[str, Tensor]:
    """The file's weights as the live layer has them: at its own scale, DoRA's lengths untouched."""
    weights = {n: t.float() for n, t in stored.weights.items()}
    if "dora_scale" in weights:
        weights["dora_scale"] = live.weights["dora_scale"]
    whole = {"lokr_w1", "lokr_w2"} <= weights.keys()
    factor = live.alpha if whole else live.alpha / stored.alpha
    if factor != 1:
        part = next(n for n in ("lora_up", "hada_w1_a", "lokr_w1", "lokr_w1_a") if n in weights)
        weights[part] = weights[part] / factor
    return weights


def live_change(layer: Any, adapter_name: str, weight: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """What peft's layer adds to its weight, like `weight`, with these tensors in place of its own for a moment."""
    parameters = layer_parameters(layer, adapter_name)
    kept = {n: p.data for n, p in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].reshape(parameter.shape).to(parameter.device, torch.float32)
        update = layer.get_delta_weight(adapter_name).detach().float().reshape(weight.shape)
        if "dora_scale" not in parameters:
            return update
        changed = weight + update
        norm = changed.flatten(1).norm(dim=1)
        scale = parameters["dora_scale"].flatten() / norm
        return changed * scale.reshape(-1, *[1] * (weight.ndim - 1)) - weight
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]


def _rounded_parameters(
    model: DiffusionModel, live: Mapping[str, LoraModule], stored: Mapping[str, LoraModule], adapter_name: str
) -> dict[str, dict[str, Tensor]]:
    """The live adapter's parameters as the file rounds them, at the live scale, under their names in each part."""
    values: dict[int, Tensor] = {}
    for name, layer in adapted_layers(model, adapter_name).items():
        weights = _back_in_place(live[name], stored[name])
        for own, parameter in layer_parameters(layer, adapter_name).items():
            values[id(parameter)] = weights[own].reshape(parameter.shape).to(model.device)
    found = {
        part: {n: values[id(p)] for n, p in module.named_parameters() if id(p) in values}
        for part, module in parts(model).items()
    }
    return {part: parameters for part, parameters in found.items() if parameters}


def _output(
    model: DiffusionModel, part: str, adapter_names: list[str], parameters: dict[str, Tensor] | None = None
) -> Tensor:
    """What a part gives on a fixed input with these adapters."""
    if part == UNET:
        return _predict(model, adapter_names, parameters)
    return _read(model, parts(model)[part], adapter_names, parameters)


@torch.no_grad()
def _read(
    model: DiffusionModel, encoder: Any, adapter_names: list[str], parameters: dict[str, Tensor] | None
) -> Tensor:
    """A text encoder's states of a fixed text [1, 16, C], in float64 on the CPU; a common padding is part of it."""
    set_active(model, adapter_names)
    device = next(encoder.parameters()).device
    ids = torch.arange(1, 17, device=device)[None] * 7
    with torch.autocast(device.type, enabled=False):
        output = torch.func.functional_call(encoder, parameters or {}, (ids,), {"output_hidden_states": True})
    return output.hidden_states[-1].double().cpu()


@torch.no_grad()
def _predict(model: DiffusionModel, adapter_names: list[str], parameters: dict[str, Tensor] | None = None) -> Tensor:
    """The UNet's prediction [2, 4, 16, 16] with these adapters on a fixed input, in float64 on the CPU."""
    set_active(model, adapter_names)
    unet: Any = model.unet
    first = next(unet.parameters())
    draw = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(first.device, first.dtype)

    config = unet.config
    latents = noise(2, config.in_channels, _LATENT_SIDE, _LATENT_SIDE)
    timesteps = torch.tensor([250, 750], device=first.device)
    arguments: dict[str, Any] = {"encoder_hidden_states": noise(2, _TOKENS, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        side = float(_LATENT_SIDE * 8)
        time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]] * 2, device=first.device)
        arguments["added_cond_kwargs"] = {"text_embeds": noise(2, pooled), "time_ids": time_ids}
    with torch.autocast(first.device.type, enabled=False):
        sample = torch.func.functional_call(unet, parameters or {}, (latents, timesteps), arguments).sample
    return sample.double().cpu()


def _arithmetic_eps(unet: nn.Module) -> float:
    first = next(unet.parameters())
    if first.dtype == torch.float32 and first.device.type == "cuda":
        return 2.0**-10  # PyTorch convolves in TF32 there
    return torch.finfo(first.dtype).eps


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
