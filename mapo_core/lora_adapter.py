"""LoRA files and the denoiser: taking the live adapter's weights off it, and putting a file on it."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .errors import ExportError
from .lora_file import LoraFile, LoraModule, read_lora, read_modules
from .lora_keys import some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from .families.base import DiffusionModel, Family


def live_modules(unet: nn.Module, adapter_name: str = "default") -> list[LoraModule]:
    """The adapter's weights in float32 on the CPU, with their true alphas.

    Raises:
        ExportError: there is no such adapter, or it is not a plain LoRA.
    """
    layers = adapted_layers(unet, adapter_name)
    if not layers:
        raise ExportError(f"The model has no LoRA named {adapter_name!r}: train first, or name the adapter.")
    modules: list[LoraModule] = []
    for name, layer in layers.items():
        if adapter_name in layer.lora_variant or layer.lora_bias.get(adapter_name):
            raise ExportError(
                f"{name} has a variant of LoRA (DoRA, or one with a bias) that the export cannot write. Train a plain "
                "LoRA."
            )
        down, up = (part[adapter_name].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
        alpha = torch.tensor(layer.scaling[adapter_name] * layer.r[adapter_name], dtype=torch.float32).item()
        modules.append(LoraModule(name, down, up, alpha))
    return modules


def load_lora(model: DiffusionModel, family: Family, path: Path, adapter_name: str) -> LoraFile:
    """Put a LoRA file of this program on the model through diffusers' loader, frozen, as the only active adapter.

    The weights are kept in float32, as the trainer keeps them; diffusers alone would round them to the model's
    precision.

    Raises:
        ExportError: the file is damaged, belongs to another kind of model, or the name is taken.
    """
    if adapter_name in getattr(model.unet, "peft_config", {}):
        raise ExportError(f"The model already has an adapter {adapter_name!r}. Load {path.name} under another name.")
    file = read_lora(path)
    layers = [n for n, m in model.unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d, LoraLayer))]
    stored = by_module(read_modules(file), family, layers)
    if len(stored) < len(file.modules):
        known = {family.kohya_prefix(n) if file.layout == "kohya" else n for n in layers}
        raise ExportError(
            f"{path} does not fit this {family.title} model: it has no layer for {some(set(file.modules) - known)}. "
            "Choose the base model that the LoRA was trained on."
        )
    try:
        attach(model, family, path, stored, adapter_name)
    except ExportError:
        detach(model.unet, adapter_name)
        raise
    set_active(model.unet, [adapter_name])
    for layer in adapted_layers(model.unet, adapter_name).values():
        layer.lora_A[adapter_name].requires_grad_(False)
        layer.lora_B[adapter_name].requires_grad_(False)
    return file


def by_module(stored: Mapping[str, LoraModule], family: Family, modules: Iterable[str]) -> dict[str, LoraModule]:
    """A file's layers under the UNet's own paths; those that are not among `modules` are left out."""
    found = {module: stored.get(module) or stored.get(family.kohya_prefix(module)) for module in modules}
    return {module: weights for module, weights in found.items() if weights is not None}


def attach(
    model: DiffusionModel, family: Family, path: Path, stored: Mapping[str, LoraModule], adapter_name: str
) -> None:
    """Load a file through diffusers and hold what arrived against `stored`, its content.

    The loaded weights, which diffusers rounds to the model's precision, are then set to float32 as in the file.

    Raises:
        ExportError: diffusers refuses the file or reads another layer, weight or scale than it holds.
    """
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            family.pipeline(model).load_lora_weights(str(path.absolute()), adapter_name=adapter_name)
    except Exception as error:  # whatever the library raises means the same here
        raise ExportError(f"diffusers cannot load {path.name}: {error}. Export the run again.") from error
    layers = adapted_layers(model.unet, adapter_name)
    if layers.keys() != stored.keys():
        raise ExportError(f"diffusers finds other layers in {path.name}: {some(layers.keys() ^ stored.keys())}.")
    for name, module in stored.items():
        layer = layers[name]
        for part, weights in ((layer.lora_A, module.down), (layer.lora_B, module.up)):
            loaded = part[adapter_name].weight
            if not torch.equal(weights.to(loaded.dtype), loaded.detach().cpu()):
                raise ExportError(f"diffusers reads other weights from {path.name} for {name} than it holds.")
            loaded.data = weights.float().to(loaded.device)
        scale, found = module.alpha / module.rank, layer.scaling[adapter_name]
        if not abs(found - scale) <= 1e-6 * abs(scale):
            raise ExportError(f"diffusers reads the scale of {name} in {path.name} as {found:g} instead of {scale:g}.")


def detach(unet: Any, adapter_name: str) -> None:
    """Remove an adapter, if it is there."""
    if adapter_name in getattr(unet, "peft_config", {}):
        unet.delete_adapters(adapter_name)
    for layer in adapted_layers(unet, adapter_name).values():  # where a failed load took only the config away
        layer.delete_adapter(adapter_name)


def adapted_layers(unet: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The layers that have this LoRA, under their paths in the UNet."""
    return {n: m for n, m in unet.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A}


def set_active(unet: nn.Module, adapter_names: list[str]) -> None:
    """Let exactly these adapters take part; none gives the base model."""
    for layer in _tuner_layers(unet):
        layer.set_adapter(adapter_names)


@contextmanager
def undisturbed(unet: nn.Module) -> Iterator[None]:
    """Inside, adapters can be added and switched and the model only predicts; afterwards every switch is as it was."""
    adapters = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in _tuner_layers(unet)]
    gradients = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    modes = [(module, module.training) for module in unet.modules()]
    wrapped = unet.__dict__.pop("forward", None)  # accelerate's, which computes in another precision
    unet.eval()
    for layer, _, _ in adapters:
        layer.enable_adapters(True)
    try:
        yield
    finally:
        for layer, active, disabled in adapters:
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
        if wrapped is not None:
            unet.forward = wrapped


def _tuner_layers(unet: nn.Module) -> list[BaseTunerLayer]:
    return [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what peft says about every second adapter and diffusers about every LoRA without text encoder."""
    logger = logging.getLogger("diffusers.loaders.lora_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            yield
    finally:
        logger.setLevel(level)
