"""Preference methods: mathematics on tensors, one file each. Importing this package does not import torch."""

from __future__ import annotations

from .base import Inversion, Loss, MethodConfig
from .dco import DCOConfig, DCOLoss
from .diffusion_dpo import DiffusionDPOConfig, DiffusionDPOLoss
from .dreambooth import DreamBoothConfig, DreamBoothLoss
from .inpo import InPOConfig, InPOLoss
from .mapo import MaPOConfig, MaPOLoss
from .safeguard import safeguard_factor
from .sft import SFTConfig, SFTLoss
from .smpo import SmPOConfig, SmPOLoss

METHODS = {
    "mapo": MaPOConfig,
    "sft": SFTConfig,
    "diffusion_dpo": DiffusionDPOConfig,
    "dco": DCOConfig,
    "dreambooth": DreamBoothConfig,
    "inpo": InPOConfig,
    "smpo": SmPOConfig,
}

WITH_SFT_TERM = frozenset({"mapo", "sft", "dreambooth"})
"""Methods with the plain denoising error in their loss; they take `sft_weight`."""
WITH_INVERSION = frozenset({"inpo", "smpo"})
"""Methods whose x_t is made by inversion."""

__all__ = [
    "METHODS",
    "WITH_INVERSION",
    "WITH_SFT_TERM",
    "DCOConfig",
    "DCOLoss",
    "DiffusionDPOConfig",
    "DiffusionDPOLoss",
    "DreamBoothConfig",
    "DreamBoothLoss",
    "InPOConfig",
    "InPOLoss",
    "Inversion",
    "Loss",
    "MaPOConfig",
    "MaPOLoss",
    "MethodConfig",
    "SFTConfig",
    "SFTLoss",
    "SmPOConfig",
    "SmPOLoss",
    "safeguard_factor",
]
