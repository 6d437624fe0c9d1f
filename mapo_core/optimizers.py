"""Optimizers and learning-rate schedules, from torch, bitsandbytes and diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .parameters import ParameterGroup
    from .sections import OptimizerConfig


def build_optimizer(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over what is trained; a group's own learning rate takes the place of the common one.

    Raises:
        ConfigError: bitsandbytes is needed and cannot be used here.
    """
    arguments: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.betas,
        "weight_decay": config.weight_decay,
        "eps": config.eps,
    }
    parameters = [
        {
            "params": list(g.parameters.values()),
            "lr": config.learning_rate if g.learning_rate is None else g.learning_rate,
        }
        for g in groups
    ]
    if config.type == "adamw":
        return torch.optim.AdamW(parameters, **arguments)
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except Exception as error:  # bitsandbytes fails in many ways where its native library does not fit
        raise ConfigError(
            f"optimizer.type adamw8bit needs bitsandbytes, which does not load here ({error}). Install it "
            "(pip install bitsandbytes), or set optimizer.type to adamw: the state then takes four times the memory."
        ) from error
    return AdamW8bit(parameters, **arguments)


def build_schedule(optimizer: Any, config: OptimizerConfig, steps: int) -> Any:
    """The course of the learning rate: warm-up, then constant, or down to zero at `steps`."""
    from diffusers.optimization import get_scheduler

    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    return get_scheduler(name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=steps)
