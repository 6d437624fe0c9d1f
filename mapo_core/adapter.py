"""The adapter on the model: adding it, switching it off for the reference, reading and writing its weights."""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from .adapter_config import Placement, peft_config, place_adapters
from .components import TEXT_ENCODERS, UNET, part_of, parts
from .errors import ConfigError, ExportError, RunError
from .lora_adapter import modules_for, put_on
from .lora_file import read_lora
from .new_tokens import add_new_tokens, class_prompt, load_token_state, token_state
from .noising import seed_of
from .parameters import ParameterGroup

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from .families.base import DiffusionModel, Family
    from .sections import AdapterConfig

ADAPTER = "default"
START = "start"  # the LoRA that training started from, frozen: part of the reference
_START_AT_ZERO = ("lora_B", "hada_w2_b", "lokr_w1.", "lokr_w1_a")  # so that training starts at the base model


def add_lora(
    model: DiffusionModel, family: Family, config: AdapterConfig, seed: int, start: Path | None = None
) -> list[ParameterGroup]:
    """Put a fresh adapter on the denoiser, and on the text encoders if they are to be trained; the rest is frozen.

    One of an update's matrices is zero, so that training starts at the base model; the others are drawn from `seed`
    alone. All are kept in float32 whatever the precision of the model.

    Args:
        model: without adapter.
        family: of the model.
        config: kind, layers, ranks and alphas.
        seed: of the run.
        start: a LoRA file to continue from. Its layers, ranks and alphas are taken in place of those of the settings,
            and a frozen copy of it stays on where the adapter is off.

    Returns:
        The parameters to train, one group for each part of the model.

    Raises:
        ConfigError: a pattern matches no layer, this kind cannot be put on a quantised model, or `start` does not fit.
        ExportError: `start` is missing or damaged.
    """
    rates = learning_rates(model, config)
    begun = _begin_from(model, family, config, start, rates) if start else []
    placements = place_adapters(model, family, config, [part for part in rates if part not in begun])
    for module in parts(model).values():
        module.requires_grad_(False)
    model.trains_text = len(rates) > 1
    added = {p.part: _add_to(p, config, seed) for p in placements}
    for part in begun:
        _train_only(parts(model)[part], ADAPTER)
        added[part] = _group(part, parts(model)[part])
    groups = [replace(added[part], learning_rate=rate) for part, rate in rates.items()]
    return [*groups, *add_new_tokens(model, config)]


def _begin_from(
    model: DiffusionModel, family: Family, config: AdapterConfig, start: Path, rates: dict[str, float | None]
) -> list[str]:
    """Put a file on the model twice, to be trained and frozen; the parts that it has layers of."""
    file = read_lora(start)
    kind = "lora" if config.type == "rslora" else config.type
    if file.kind != kind:
        raise ConfigError(
            f"adapter.init_from: {start.name} is of the kind {file.kind}, and adapter.type is {config.type}. Set "
            f"adapter.type to {file.kind}, or merge the file into the model with model.merge_loras."
        )
    try:
        stored = modules_for(model, family, file)
    except ExportError as error:
        raise ConfigError(f"adapter.init_from: {error}") from error
    begun = list(dict.fromkeys(part_of(name) for name in stored))
    idle = [part for part in begun if part not in rates]
    if idle:
        raise ConfigError(
            f"adapter.init_from: {start.name} changes {' and '.join(idle)} too. Set adapter.text_encoder (with "
            "learning rates above 0), or merge the file into the model with model.merge_loras."
        )
    if begun != [UNET]:  # what prompts give without the adapter depends on it
        model.extras["start"] = hashlib.sha256(start.read_bytes()).hexdigest()
    put_on(model, stored, START)
    put_on(model, stored, ADAPTER, config.dropout)
    return begun


def _train_only(module: nn.Module, adapter_name: str) -> None:
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(adapter_name)


def _group(part: str, module: nn.Module) -> ParameterGroup:
    return ParameterGroup(part, {n: p for n, p in module.named_parameters() if p.requires_grad})


def learning_rates(model: DiffusionModel, config: AdapterConfig) -> dict[str, float | None]:
    """The parts that get an adapter, each with its own learning rate or None."""
    rates = (config.text_encoder_learning_rate, config.text_encoder_2_learning_rate)
    own: dict[str, float | None] = dict(zip(TEXT_ENCODERS, rates, strict=True))
    text = {part: own[part] for part in parts(model) if part != UNET and config.text_encoder and own[part] != 0}
    return {UNET: None, **text}


def _add_to(placement: Placement, config: AdapterConfig, seed: int) -> ParameterGroup:
    module: Any = placement.module
    if config.type in {"loha", "lokr"}:
        _require_whole_weights(placement, config.type)
    lora = peft_config(config, placement)
    if placement.part == UNET:
        module.add_adapter(lora, adapter_name=ADAPTER)
    else:
        inject_adapter_in_model(lora, module, adapter_name=ADAPTER)
    # peft draws the initial weights on the model's device and in its precision; draw them again on the CPU, so
    # that a seed gives the same LoRA on every machine.
    generator = torch.Generator().manual_seed(
        seed_of(seed, "adapter") if placement.part == UNET else seed_of(seed, "adapter", placement.part)
    )
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            if not any(part in name for part in (*_START_AT_ZERO, "lora_magnitude_vector")):
                parameter.data.copy_(_initial(name, parameter, generator))
    if config.type == "dora":
        _set_lengths(module)
    module.train(module.training)  # what peft has added is in training mode
    return _group(placement.part, module)


def _initial(name: str, parameter: nn.Parameter, generator: torch.Generator) -> Tensor:
    if "lora_A" in name:
        return torch.randn(parameter.shape, generator=generator) / parameter.shape[0]  # Gaussian over the rank
    bound = 1 / math.sqrt(parameter[0].numel())  # as peft draws LoHa and LoKr
    return (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound


def _set_lengths(module: nn.Module) -> None:
    """DoRA's lengths from the base weights in float32, as the forward pass computes them; peft has rounded them."""
    for layer in module.modules():
        vectors: Any = getattr(layer, "lora_magnitude_vector", {})
        if ADAPTER in vectors:
            tuner: Any = layer
            vectors[ADAPTER].update_layer(
                base_layer=tuner.get_base_layer(),
                lora_A=tuner.lora_A[ADAPTER].weight,
                lora_B=tuner.lora_B[ADAPTER].weight,
                scaling=tuner.scaling[ADAPTER],
            )
            vectors[ADAPTER].weight.data = vectors[ADAPTER].weight.data.detach().float()


def _require_whole_weights(placement: Placement, kind: str) -> None:
    for path in placement.ranks:
        layer: Any = placement.module.get_submodule(path)
        if hasattr(layer, "in_features") and tuple(layer.weight.shape) != (layer.out_features, layer.in_features):
            raise ConfigError(
                f"adapter.type {kind} needs the base model's weights as they are, and {path} is packed into 4 bits. "
                "Choose adapter.type lora, rslora or dora, or another quantisation."
            )


@contextmanager
def adapter_off(unet: nn.Module) -> Iterator[None]:
    """Inside, the denoiser is the base model; with a LoRA that training started from, the model with that one."""
    layers = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
    started = [layer for layer in layers if START in layer._all_available_adapter_names()]
    if started:
        for layer in started:
            layer.set_adapter([START], inference_mode=True)
    else:
        for layer in layers:
            layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in started:
            layer.set_adapter([ADAPTER])
        for layer in layers if not started else ():
            layer.enable_adapters(True)


@contextmanager
def base_model(model: DiffusionModel) -> Iterator[None]:
    """Inside, denoiser and text encoders are the base model's."""
    with ExitStack() as stack:
        for module in parts(model).values():
            stack.enter_context(adapter_off(module))
        yield


def adapter_is_off(module: nn.Module) -> bool:
    """Whether this is inside `adapter_off`."""
    layers = (m for m in module.modules() if isinstance(m, BaseTunerLayer))
    return any(m.disable_adapters or list(m.active_adapters) == [START] for m in layers)


def encode_prompts(
    model: DiffusionModel, family: Family, prompts: Sequence[str], *, base: bool
) -> list[dict[str, Tensor]]:
    """Prompts as the trained text encoders see them, or as the base model's do; without dropout, float32 on the CPU."""
    modes = [(encoder, encoder.training) for encoder in model.text_encoders]
    for encoder, _ in modes:
        encoder.eval()
    try:
        with base_model(model) if base else nullcontext():
            texts = [class_prompt(p, model.new_tokens) for p in prompts] if base else prompts
            return family.encode_prompts(model, texts)
    finally:
        for encoder, training in modes:
            encoder.train(training)


@contextmanager
def lora_strength(model: DiffusionModel, strength: float) -> Iterator[None]:
    """Inside, the adapter's change of every weight is multiplied by `strength`, as ComfyUI's LoRA loader does it."""
    undo: list[Any] = []
    layers: list[Any] = [m for part in parts(model).values() for m in part.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        vectors = getattr(layer, "lora_magnitude_vector", {})
        if ADAPTER in vectors:  # what DoRA's own module gives is all that it adds to the layer's output
            undo.append(vectors[ADAPTER].register_forward_hook(lambda _m, _i, output: output * strength).remove)
        elif ADAPTER in layer.scaling:
            undo.append(_scaled(layer, strength))
    try:
        yield
    finally:
        for back in undo:
            back()


def _scaled(layer: Any, strength: float) -> Any:
    before = layer.scaling[ADAPTER]
    layer.scaling[ADAPTER] = before * strength
    return lambda: layer.scaling.update({ADAPTER: before})


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """The weights of one module's adapter under peft's names."""
    return {k: v.detach() for k, v in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items()}


def adapter_state(model: DiffusionModel) -> dict[str, Tensor]:
    """All that is trained: the denoiser's adapter under peft's names, the text encoders' behind `text_encoder.`."""
    state: dict[str, Tensor] = {}
    for part, module in parts(model).items():
        if ADAPTER in getattr(module, "peft_config", {}):
            prefix = "" if part == UNET else f"{part}."
            state |= {prefix + name: tensor for name, tensor in lora_state(module).items()}
    return state | token_state(model)


def load_adapter_state(model: DiffusionModel, state: dict[str, Tensor]) -> None:
    """Put back what `adapter_state` gave.

    Raises:
        RunError: the names or shapes do not fit the adapter, so it is another run's.
    """
    expected = {name: tensor.shape for name, tensor in adapter_state(model).items()}
    given = {name: tensor.shape for name, tensor in state.items()}
    odd = sorted(n for n in expected.keys() | given.keys() if expected.get(n) != given.get(n))
    if odd:
        raise RunError(
            f"The checkpoint's LoRA does not fit this run's settings (for example {', '.join(odd[:3])}). Resume with "
            "the run's own config.json, or start a new run."
        )
    load_token_state(model, state)
    state = {name: tensor for name, tensor in state.items() if name not in token_state(model)}
    for part, module in parts(model).items():
        if ADAPTER in getattr(module, "peft_config", {}):
            own = {k: v for k, v in state.items() if _belongs(k, part)}
            prefix = "" if part == UNET else f"{part}."
            set_peft_model_state_dict(module, {k.removeprefix(prefix): v for k, v in own.items()}, adapter_name=ADAPTER)


def _belongs(name: str, part: str) -> bool:
    first = name.partition(".")[0]
    return first == part if first in TEXT_ENCODERS else part == UNET
