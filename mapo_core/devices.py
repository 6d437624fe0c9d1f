"""Which device and precision a setting means on this machine."""

from __future__ import annotations

import torch

from .errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def preferred_device(name: str) -> torch.device:
    """The device of a setting; "auto" takes a GPU if there is one.

    Raises:
        ConfigError: it is not a device, or not one of this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"training.device {name!r} is not a device: use auto, cpu, cuda, cuda:1 or mps.") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"training.device is {name}, but torch sees {torch.cuda.device_count()} CUDA devices. Install a CUDA build "
            "of torch (MAPO_TORCH in the README), or set --training.device auto."
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("training.device is mps, but this machine has none: set --training.device auto.")
    return device


def choose_precision(asked: str, device: torch.device) -> str:
    """The precision that "auto" means on a device.

    Raises:
        ConfigError: the precision cannot train there.
    """
    if asked == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return "fp32"
    if asked == "fp16" and device.type != "cuda":
        raise ConfigError("training.precision fp16 needs a CUDA device; use bf16 or fp32 here.")
    return asked
