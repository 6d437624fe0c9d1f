"""Switches that make a step faster without changing what it does, beyond rounding."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

import torch

from .errors import ConfigError

if TYPE_CHECKING:
    from .families.base import DiffusionModel
    from .session import Session


def set_checkpointing(model: DiffusionModel, on: bool) -> None:
    """Compute activations twice instead of keeping them, in the denoiser and in text encoders that are trained."""
    unet: Any = model.unet
    (unet.enable_gradient_checkpointing if on else unet.disable_gradient_checkpointing)()
    encoders: list[Any] = list(model.text_encoders)
    for encoder in encoders:
        if on:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})
        else:  # newer versions of transformers have another name for it
            getattr(encoder, "activation_checkpointing_disable", encoder.gradient_checkpointing_disable)()


def allow_tf32(on: bool) -> None:
    """Let float32 products and convolutions on CUDA use TF32, or not; torch's own default is convolutions alone."""
    if on:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let AdamW make its step in one kernel.

    Raises:
        ConfigError: the optimizer is another one.
    """
    if not isinstance(optimizer, torch.optim.AdamW):
        raise ConfigError(
            f'memory.fused_optimizer needs optimizer.type "adamw"; this run has {type(optimizer).__name__}, which has '
            "no such form. Switch memory.fused_optimizer off."
        )
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False


def compile_blocks(session: Session) -> None:
    """Compile the denoiser's repeated blocks, each kind once.

    Raises:
        ConfigError: nothing here can compile, or the base is kept in a form that cannot be compiled.
    """
    plan, device = session.plan, session.accelerator.device
    if plan.base_precision != "full" or plan.offload_share:
        raise ConfigError(
            "memory.compile needs the base in full precision and on the device; this run keeps it in "
            f"{plan.base_precision} with {plan.offload_share:.0%} offloaded. Switch memory.compile off."
        )
    if device.type != "cuda" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise ConfigError("memory.compile needs a C++ compiler (g++ or clang++). Install one, or switch it off.")
    if device.type == "cuda" and sys.platform != "linux":
        raise ConfigError("memory.compile on a GPU needs Linux (triton). Switch it off.")
    unet: Any = session.model.unet
    unet.compile_repeated_blocks()
