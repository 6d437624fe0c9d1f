"""Preference methods: mathematics on tensors, one file each. Importing this package does not import torch."""

from __future__ import annotations

from .base import Loss, MethodConfig
from .dco import DCOConfig, DCOLoss
from .diffusion_dpo import DiffusionDPOConfig, DiffusionDPOLoss
from .mapo import MaPOConfig, MaPOLoss
from .sft import SFTConfig, SFTLoss

METHODS = {"mapo": MaPOConfig, "sft": SFTConfig, "diffusion_dpo": DiffusionDPOConfig, "dco": DCOConfig}

__all__ = [
    "METHODS",
    "DCOConfig",
    "DCOLoss",
    "DiffusionDPOConfig",
    "DiffusionDPOLoss",
    "Loss",
    "MaPOConfig",
    "MaPOLoss",
    "MethodConfig",
    "SFTConfig",
    "SFTLoss",
]
