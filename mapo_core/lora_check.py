"""The proof that a LoRA file holds the live adapter.

Four steps, each of which has failed in practice: every key belongs to a layer and every layer is there; the stored
weights are the live ones at the stored precision; diffusers' loader arrives at the same weights and scales; and the
model predicts with the file what it predicts with the live adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import ExportError
from .lora_adapter import attach, by_module, detach, live_modules, set_active, undisturbed
from .lora_file import DIFFUSERS, DTYPES, file_keys, read_lora, read_modules, stored_form
from .lora_keys import KOHYA, KOHYA_SUFFIXES, block_layout, check_against_naming_rules, some

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .families.base import DiffusionModel, Family
    from .lora_file import LoraModule

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
    live = {m.name: m for m in live_modules(model.unet, adapter_name)}
    _check_keys(model, family, path, live)
    file = read_lora(path)
    stored = by_module(read_modules(file), family, live)
    _check_weights(path, live, stored)
    with undisturbed(model.unet):
        base = _predict(model.unet, [])
        trained = _predict(model.unet, [adapter_name])
        rounded = _predict(model.unet, [adapter_name], _rounded_parameters(model, live, stored, adapter_name))
        try:
            attach(model, family, path, stored, _CHECK)
            loaded = _predict(model.unet, [_CHECK])
        finally:
            set_active(model.unet, [adapter_name])
            detach(model.unet, _CHECK)
    error = _arithmetic_eps(model.unet), torch.finfo(next(iter(stored.values())).down.dtype).eps
    return compare_predictions(path.name, base, trained, rounded, loaded, *error)


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
    kohya = any(k.startswith(KOHYA) for k in keys)
    suffixes = KOHYA_SUFFIXES if kohya else ("lora_A.weight", "lora_B.weight")
    names = [family.kohya_prefix(name) if kohya else DIFFUSERS + name for name in live]
    expected = {f"{name}.{suffix}" for name in names for suffix in suffixes}
    faults = {"lacks": expected - keys, "has in excess": keys - expected}
    problems = [f"{label} {some(odd)}" for label, odd in faults.items() if odd]
    if problems:
        raise ExportError(f"{path.name} {' and '.join(problems)}. Export the run again: mapo export RUN.")
    if kohya:
        check_against_naming_rules(keys, family.name, block_layout(model.unet.config))


def _check_weights(path: Path, live: Mapping[str, LoraModule], stored: Mapping[str, LoraModule]) -> None:
    """Bit for bit: the file has the live weights at its own precision and scale."""
    for name, module in live.items():
        found = stored[name]
        if found.down.dtype not in DTYPES.values():
            raise ExportError(f"{path.name} has {found.name} as {found.down.dtype}, which no program here writes.")
        expected = stored_form(module, found.alpha, found.down.dtype)
        for part in ("down", "up"):
            if not torch.equal(getattr(expected, part), getattr(found, part)):
                raise ExportError(
                    f"{path.name}: the {part} weights of {found.name} (alpha {found.alpha:g}) are not the trained "
                    "ones. Export the run again: mapo export RUN."
                )


def _rounded_parameters(
    model: DiffusionModel, live: Mapping[str, LoraModule], stored: Mapping[str, LoraModule], adapter_name: str
) -> dict[str, Tensor]:
    """The live adapter's parameters as the file rounds them, at the live scale."""
    parameters: dict[str, Tensor] = {}
    for name, module in live.items():
        found = stored[name]
        up = found.up.float() if found.alpha == module.alpha else found.up.float() * (found.alpha / module.alpha)
        parameters[f"{name}.lora_A.{adapter_name}.weight"] = found.down.float().to(model.device)
        parameters[f"{name}.lora_B.{adapter_name}.weight"] = up.to(model.device)
    return parameters


@torch.no_grad()
def _predict(unet: Any, adapter_names: list[str], parameters: dict[str, Tensor] | None = None) -> Tensor:
    """The UNet's prediction [2, 4, 16, 16] with these adapters on a fixed input, in float64 on the CPU."""
    set_active(unet, adapter_names)
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
