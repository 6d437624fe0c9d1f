"""Optimizers and learning-rate schedules; all of them are other libraries' (PACKAGES, diffusers)."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import torch

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .parameters import ParameterGroup
    from .sections import OptimizerConfig

PACKAGES = {  # what pip calls the library of each
    "adamw8bit": "bitsandbytes",
    "paged_adamw8bit": "bitsandbytes",
    "lion8bit": "bitsandbytes",
    "adafactor": "transformers",
    "prodigy": "prodigyopt",
    "schedulefree_adamw": "schedulefree",
}
# Above these a LoRA is usually ruined; a sign in all weights (Lion) is a larger step than Adam's.
HIGH_RATES = {"lion8bit": 1e-3, "schedulefree_adamw": 5e-2, "prodigy": 10.0}
HIGH_RATE = 1e-2


def build_optimizer(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over what is trained; a group's own learning rate takes the place of the common one.

    Raises:
        ConfigError: its library is not installed or does not load, or the groups do not suit it.
    """
    parameters = parameter_groups(groups, config)
    common: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.type == "adamw":
        return torch.optim.AdamW(parameters, betas=config.betas, eps=config.eps, **common)
    kind = _class_of(config.type)
    if config.type == "lion8bit":  # has no eps: it steps along the sign
        return kind(parameters, betas=config.betas, **common)
    if config.type == "adafactor":  # the learning rate is the one given, not one of its own making
        return kind(parameters, relative_step=False, scale_parameter=False, warmup_init=False, **common)
    common |= {"betas": config.betas, "eps": config.eps}
    if config.type == "schedulefree_adamw":  # weighs the steps of the warm-up less in its average
        return kind(parameters, warmup_steps=config.warmup_steps, **common)
    if config.type == "prodigy":
        with contextlib.redirect_stdout(io.StringIO()):  # it prints which weight decay it uses
            return kind(
                parameters,
                d_coef=config.prodigy_d_coef,
                use_bias_correction=True,
                safeguard_warmup=config.warmup_steps > 0,
                **common,
            )
    return kind(parameters, **common)


def parameter_groups(groups: Sequence[ParameterGroup], config: OptimizerConfig) -> list[dict[str, Any]]:
    """torch's parameter groups with their learning rates; with LoRA+ the up weights have one of their own.

    Raises:
        ConfigError: LoRA+ is asked for and there are no up weights, or Prodigy is to have several learning rates.
    """
    found: list[dict[str, Any]] = []
    for group in groups:
        rate = config.learning_rate if group.learning_rate is None else group.learning_rate
        up = [p for n, p in group.parameters.items() if "lora_B" in n and config.lora_plus_ratio != 1]
        is_up = {id(p) for p in up}
        rest = [p for p in group.parameters.values() if id(p) not in is_up]
        found += [{"params": rest, "lr": rate}] if rest else []
        found += [{"params": up, "lr": rate * config.lora_plus_ratio}] if up else []
    rates = {g["lr"] for g in found}
    if config.lora_plus_ratio != 1 and len(found) == len(groups):
        raise ConfigError(
            "optimizer.lora_plus_ratio needs an adapter with up weights (LoRA, rsLoRA, DoRA). Set it to 1, or choose "
            "another adapter."
        )
    if config.type == "prodigy" and len(rates) > 1:
        raise ConfigError(
            "prodigy finds one learning rate for all weights, but this run has several "
            f"({', '.join(f'{r:g}' for r in sorted(rates))}). Leave the parts' own learning rates empty, or choose "
            "another optimizer.type."
        )
    return found


def _class_of(kind: str) -> Any:
    """The optimizer's class.

    Raises:
        ConfigError: its library does not load.
    """
    try:
        return _imported(kind)
    except Exception as error:  # bitsandbytes fails in many ways where its native library does not fit
        package = PACKAGES[kind]
        instead = ": the state then takes four times the memory" if package == "bitsandbytes" else ""
        raise ConfigError(
            f"optimizer.type {kind} needs {package}, which does not load here ({error}). Install it "
            f"(pip install {package}), or set optimizer.type to adamw{instead}."
        ) from error


def _imported(kind: str) -> Any:
    if kind == "adafactor":
        from transformers.optimization import Adafactor as found
    elif kind == "prodigy":
        from prodigyopt import Prodigy as found
    elif kind == "schedulefree_adamw":
        from schedulefree import AdamWScheduleFree as found
    elif kind == "lion8bit":
        from bitsandbytes.optim.lion import Lion8bit as found
    else:
        from bitsandbytes.optim import adamw

        found = adamw.PagedAdamW8bit if kind == "paged_adamw8bit" else adamw.AdamW8bit
    return found


def build_schedule(optimizer: Any, config: OptimizerConfig, steps: int) -> Any:
    """The course of the learning rate: warm-up, then what `schedule` says, over `steps`."""
    from diffusers.optimization import get_scheduler

    name = {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule)
    return get_scheduler(
        name,
        optimizer,
        step_rules=config.schedule_rules or None,
        num_warmup_steps=0 if config.type == "schedulefree_adamw" else config.warmup_steps,
        num_training_steps=steps,
        num_cycles=config.schedule_cycles,
        power=config.schedule_power,
    )


def learning_rate_in_use(optimizer: Any, schedule: Any) -> float:
    """The step size of the first group: what the schedule says, times what Prodigy has found."""
    group = optimizer.param_groups[0]
    if "scheduled_lr" in group and group["k"] > 0:  # schedule-free: its own warm-up
        return float(group["scheduled_lr"])
    return float(schedule.get_last_lr()[0]) * float(group.get("d", 1.0))


def learning_rate_warning(config: OptimizerConfig) -> str | None:
    """What is odd about the learning rate for this optimizer, if anything."""
    limit = HIGH_RATES.get(config.type, HIGH_RATE)
    if config.learning_rate * config.lora_plus_ratio <= limit:
        return None
    ratio = f" times optimizer.lora_plus_ratio {config.lora_plus_ratio:g}" if config.lora_plus_ratio != 1 else ""
    return (
        f"optimizer.learning_rate {config.learning_rate:g}{ratio} is unusually high for {config.type} (LoRAs rarely "
        f"stand more than {limit:g}). If the error on chosen images rises, stop and lower it."
    )


@contextlib.contextmanager
def evaluation_weights(optimizer: Any, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Inside, a schedule-free optimizer's weights are its averages, which are what is measured and exported.

    Afterwards they are bit for bit those of before: the library's own way back (`train()`) rounds.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not has_own_average(inner) or not inner.param_groups[0]["train_mode"]:
        yield
        return
    before = [p.detach().clone() for p in parameters]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


def has_own_average(optimizer: Any) -> bool:
    """Whether what it trains and what it gives are two sets of weights."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return "train_mode" in inner.param_groups[0]
