"""The LoRA on the denoiser: adding it, switching it off for the reference, reading and writing its weights."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from .errors import RunError
from .noising import seed_of
from .parameters import ParameterGroup

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    from .families.base import DiffusionModel, Family
    from .sections import AdapterConfig

ADAPTER = "default"


def add_lora(model: DiffusionModel, family: Family, config: AdapterConfig, seed: int) -> list[ParameterGroup]:
    """Put a fresh LoRA on the denoiser; everything else is frozen.

    The down weights are Gaussian and the up weights zero, so that training starts at the base model. They are drawn
    from `seed` alone and kept in float32 whatever the precision of the model.

    Returns:
        The parameters to train, as one group.
    """
    model.unet.requires_grad_(False)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        init_lora_weights="gaussian",
        target_modules=family.target_modules(config.targets),
    )
    model.unet.add_adapter(lora, adapter_name=ADAPTER)  # pyright: ignore[reportCallIssue]
    # peft draws the initial weights on the model's device and in its precision; draw them again on the CPU, so
    # that a seed gives the same LoRA on every machine.
    generator = torch.Generator().manual_seed(seed_of(seed, "adapter"))
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.unet.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.data = parameter.data.float()
        if "lora_A" in name:
            drawn = torch.randn(parameter.shape, generator=generator) / config.rank
            parameter.data.copy_(drawn)
        parameters[name] = parameter
    return [ParameterGroup("unet", parameters)]


@contextmanager
def adapter_off(unet: nn.Module) -> Iterator[None]:
    """Inside, the denoiser is the base model."""
    layers = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def lora_strength(unet: nn.Module, strength: float) -> Iterator[None]:
    """Inside, the LoRA's update is multiplied by `strength`."""
    layers: list[Any] = [m for m in unet.modules() if isinstance(m, BaseTunerLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scaling[ADAPTER] *= strength
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


def lora_state(unet: nn.Module) -> dict[str, Tensor]:
    """The LoRA's weights under peft's names."""
    return {k: v.detach() for k, v in get_peft_model_state_dict(unet, adapter_name=ADAPTER).items()}


def load_lora_state(unet: nn.Module, state: dict[str, Tensor]) -> None:
    """Put back what `lora_state` gave.

    Raises:
        RunError: the names do not fit the adapter, so it is another run's.
    """
    expected = set(lora_state(unet))
    if expected != set(state):
        odd = sorted(expected ^ set(state))[:3]
        raise RunError(
            f"The checkpoint's LoRA does not fit this run's settings (for example {', '.join(odd)}). Resume with the "
            "run's own config.json, or start a new run."
        )
    set_peft_model_state_dict(unet, state, adapter_name=ADAPTER)
