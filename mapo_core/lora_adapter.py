"""LoRA files and the model: taking the live adapter's weights off it, and putting a file on it."""

from __future__ import annotations

import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from .adapter_config import peft_pattern
from .components import named_layers, part_of, parts, path_in
from .errors import ExportError
from .lora_file import (
    COMFYUI_LENGTHS,
    DORA_METADATA,
    LoraFile,
    LoraModule,
    read_lora,
    read_modules,
    with_comfyui_lengths,
)
from .lora_keys import LYCORIS, some

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

    from .families.base import DiffusionModel, Family

_PEFT = {"lora_down": "lora_A", "lora_up": "lora_B", "dora_scale": "lora_magnitude_vector"}


def live_modules(model: DiffusionModel, adapter_name: str = "default") -> list[LoraModule]:
    """The adapter's weights in float32 on the CPU, with their true alphas.

    Raises:
        ExportError: there is no such adapter, or it is of a kind that no file can hold.
    """
    layers = adapted_layers(model, adapter_name)
    if not layers:
        raise ExportError(f"The model has no LoRA named {adapter_name!r}: train first, or name the adapter.")
    modules: list[LoraModule] = []
    for name, layer in layers.items():
        parameters = layer_parameters(layer, adapter_name)
        variant = isinstance(layer, LoraLayer) and adapter_name in layer.lora_variant
        if (variant and "dora_scale" not in parameters) or getattr(layer, "lora_bias", {}).get(adapter_name):
            raise ExportError(
                f"{name} has a variant of LoRA (one with a bias, for example) that the export cannot write. Train a "
                "plain LoRA."
            )
        weights = {n: p.detach().float().cpu() for n, p in parameters.items()}
        if "dora_scale" in weights:
            weights["dora_scale"] = weights["dora_scale"].flatten()
        module = LoraModule(name, weights, 1.0, base_weight_of(layer))
        whole = {"lokr_w1", "lokr_w2"} <= weights.keys()
        rank = 1 if whole else layer.r[adapter_name]
        alpha = torch.tensor(layer.scaling[adapter_name] * rank, dtype=torch.float32).item()
        modules.append(LoraModule(module.name, weights, alpha, module.base))
    return modules


def layer_parameters(layer: Any, adapter_name: str) -> dict[str, Tensor]:
    """A layer's trained tensors under the names of `LoraModule.weights`."""
    if isinstance(layer, LoraLayer):
        found = {own: getattr(layer, name) for own, name in _PEFT.items()}
        return {own: held[adapter_name].weight for own, held in found.items() if adapter_name in held}
    return {n: getattr(layer, n)[adapter_name] for n in LYCORIS if adapter_name in getattr(layer, n, {})}


def base_weight_of(layer: Any) -> Callable[[], Tensor]:
    """Gives the layer's own weight in float32, unpacked where it is quantised, whole where processes share it."""
    base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    whole = getattr(base, "whole_weight", lambda: dequantize_module_weight(base))
    return lambda: whole().detach().float()


def load_lora(model: DiffusionModel, family: Family, path: Path, adapter_name: str) -> LoraFile:
    """Put a LoRA file of this program on the model, frozen, as the only active adapter.

    LoRA goes through diffusers' loader; LoHa, LoKr and DoRA in the kohya layout, for which it has none, through peft.
    The weights are kept in float32, as the trainer keeps them; diffusers alone would round them to the model's
    precision.

    Raises:
        ExportError: the file is damaged, belongs to another kind of model, or the name is taken.
    """
    if adapter_name in getattr(model.unet, "peft_config", {}):
        raise ExportError(f"The model already has an adapter {adapter_name!r}. Load {path.name} under another name.")
    file = read_lora(path)
    stored = modules_for(model, family, file)
    try:
        attach(model, family, file, stored, adapter_name)
    except ExportError:
        detach(model, adapter_name)
        raise
    set_active(model, [adapter_name])
    for layer in adapted_layers(model, adapter_name).values():
        for parameter in layer_parameters(layer, adapter_name).values():
            parameter.requires_grad_(False)
    return file


def modules_for(model: DiffusionModel, family: Family, file: LoraFile) -> dict[str, LoraModule]:
    """A file's layers under the model's full names.

    Raises:
        ExportError: it has layers that the model has not.
    """
    kinds = (nn.Linear, nn.Conv2d, BaseTunerLayer)
    layers = {n: m for n, m in named_layers(model) if isinstance(m, kinds) and ".base_layer" not in n}
    found = by_module(read_modules(file), family, layers)
    if len(found) < len(file.modules):
        known = {family.kohya_prefix(n) if file.layout == "kohya" else n for n in layers}
        raise ExportError(
            f"{file.path} does not fit this {family.title} model: it has no layer for "
            f"{some(set(file.modules) - known)}. Choose the base model that the LoRA was trained on."
        )
    based = {n: LoraModule(n, m.weights, m.alpha, lambda layer=layers[n]: _weight_of(layer)) for n, m in found.items()}
    if file.kind == "dora" and file.metadata.get(DORA_METADATA) == COMFYUI_LENGTHS:
        return {n: with_comfyui_lengths(m, back=True) for n, m in based.items()}
    return based


def _weight_of(layer: Any) -> Tensor:
    return base_weight_of(layer)()


def by_module(stored: Mapping[str, LoraModule], family: Family, modules: Iterable[str]) -> dict[str, LoraModule]:
    """A file's layers under full names; those that are not among `modules` are left out."""
    found = {module: stored.get(module) or stored.get(family.kohya_prefix(module)) for module in modules}
    return {module: weights for module, weights in found.items() if weights is not None}


def attach(
    model: DiffusionModel, family: Family, file: LoraFile, stored: Mapping[str, LoraModule], adapter_name: str
) -> None:
    """Load a file and hold what arrived against `stored`, its content.

    The loaded weights, which diffusers rounds to the model's precision, are then set to float32 as in the file.

    Raises:
        ExportError: the library refuses the file or reads another layer, weight or scale than it holds.
    """
    own = file.kind in {"loha", "lokr"} or (file.kind == "dora" and file.layout == "kohya")
    library = "peft" if own else "diffusers"
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            if own:
                _inject(model, file.kind, stored, adapter_name)
            else:
                family.pipeline(model).load_lora_weights(str(file.path.absolute()), adapter_name=adapter_name)
    except Exception as error:  # whatever the library raises means the same here
        raise ExportError(f"{library} cannot load {file.path.name}: {error}. Export the run again.") from error
    layers = adapted_layers(model, adapter_name)
    if layers.keys() != stored.keys():
        raise ExportError(f"{library} finds other layers in {file.path.name}: {some(layers.keys() ^ stored.keys())}.")
    for name, module in stored.items():
        layer = layers[name]
        for own_name, loaded in layer_parameters(layer, adapter_name).items():
            weights = module.weights[own_name].reshape(loaded.shape)
            if not own and not torch.equal(weights.to(loaded.dtype), loaded.detach().cpu()):
                raise ExportError(f"{library} reads other weights from {file.path.name} for {name} than it holds.")
            loaded.data = weights.float().to(loaded.device)
        scale, found = module.alpha / module.rank, layer.scaling[adapter_name]
        if not abs(found - scale) <= 1e-6 * abs(scale):
            raise ExportError(
                f"{library} reads the scale of {name} in {file.path.name} as {found:g} instead of {scale:g}."
            )


def put_on(model: DiffusionModel, stored: Mapping[str, LoraModule], adapter_name: str, dropout: float = 0.0) -> None:
    """Add an adapter of any kind with these weights, in float32; they are trained with this dropout."""
    kind = next(iter(stored.values())).kind
    with _quiet(), torch.random.fork_rng(devices=[]):
        _inject(model, kind, stored, adapter_name, dropout)
    for name, layer in adapted_layers(model, adapter_name).items():
        for own_name, parameter in layer_parameters(layer, adapter_name).items():
            weights = stored[name].weights[own_name].float().reshape(parameter.shape)
            parameter.data = weights.to(parameter.device).clone()  # another adapter may have the same


@contextmanager
def beside(model: DiffusionModel, modules: Iterable[LoraModule], adapter_name: str, live: str) -> Iterator[None]:
    """Inside, the model has another adapter too; afterwards it is as before."""
    with undisturbed(model):
        try:
            put_on(model, {m.name: m for m in modules}, adapter_name)
            yield
        finally:
            set_active(model, [live])
            detach(model, adapter_name)


def _inject(
    model: DiffusionModel, kind: str, stored: Mapping[str, LoraModule], adapter_name: str, dropout: float = 0.0
) -> None:
    """Make room for a file's weights with peft, which draws random ones."""
    for part, module in parts(model).items():
        own = {path_in(part, module, n): m for n, m in stored.items() if part_of(n) == part}
        if not own:
            continue
        patterns: dict[str, Any] = {
            "r": 1,
            "rank_pattern": peft_pattern({path: m.rank for path, m in own.items()}, 1),
            "alpha_pattern": peft_pattern({path: m.alpha for path, m in own.items()}, 1),
            "target_modules": list(own),
        }
        if kind == "loha":
            config: Any = LoHaConfig(alpha=1, rank_dropout=dropout, **patterns)
        elif kind == "lokr":
            config = LoKrConfig(alpha=1, rank_dropout=dropout, rank_dropout_scale=True, **patterns)
        else:
            config = LoraConfig(lora_alpha=1, lora_dropout=dropout, use_dora=kind == "dora", **patterns)
        inject_adapter_in_model(config, module, adapter_name=adapter_name)
        if kind == "lokr":
            _shape_lokr(module, own, adapter_name)


def _shape_lokr(module: nn.Module, own: Mapping[str, LoraModule], adapter_name: str) -> None:
    """Give LoKr layers the tensors of the file; peft's own depend on a factor that a file does not say."""
    for path, stored in own.items():
        layer: Any = module.get_submodule(path)
        device = next(p.device for p in layer.parameters())
        for name in (n for n in LYCORIS if n.startswith("lokr")):
            held = getattr(layer, name)
            if adapter_name in held:
                del held[adapter_name]
            if name in stored.weights:
                held[adapter_name] = nn.Parameter(stored.weights[name].float().to(device))


def detach(model: DiffusionModel, adapter_name: str) -> None:
    """Remove an adapter, if it is there."""
    for module in parts(model).values():
        getattr(module, "peft_config", {}).pop(adapter_name, None)
    for layer in adapted_layers(model, adapter_name).values():
        layer.delete_adapter(adapter_name)


def adapted_layers(model: DiffusionModel, adapter_name: str) -> dict[str, Any]:
    """The layers that have this adapter, under their full names."""
    return {
        name: layer
        for name, layer in named_layers(model)
        if isinstance(layer, BaseTunerLayer) and layer_parameters(layer, adapter_name)
    }


def set_active(model: DiffusionModel, adapter_names: list[str]) -> None:
    """Let exactly these adapters take part; none gives the base model."""
    for layer in _tuner_layers(model):
        layer.set_adapter(adapter_names)


@contextmanager
def undisturbed(model: DiffusionModel) -> Iterator[None]:
    """Inside, adapters can be added and switched and the model only predicts; afterwards every switch is as it was."""
    modules = list(parts(model).values())
    adapters = [(layer, list(layer.active_adapters), layer.disable_adapters) for layer in _tuner_layers(model)]
    gradients = [(parameter, parameter.requires_grad) for one in modules for parameter in one.parameters()]
    modes = [(module, module.training) for one in modules for module in one.modules()]
    wrapped = [(one, one.__dict__.pop("forward", None)) for one in modules]  # accelerate's, in another precision
    for one in modules:
        one.eval()
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
        for one, forward in wrapped:
            if forward is not None:
                one.forward = forward


def _tuner_layers(model: DiffusionModel) -> list[BaseTunerLayer]:
    return [m for one in parts(model).values() for m in one.modules() if isinstance(m, BaseTunerLayer)]


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
