"""Images to latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from .base import DiffusionModel


@torch.no_grad()
def encode_images(model: DiffusionModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] in [-1, 1] to mean and standard deviation of the scaled latents, [B, 4, h, w] float32.

    Always in float32: SDXL's own VAE overflows in fp16.
    """
    vae: Any = model.vae
    device = next(vae.parameters()).device
    with torch.autocast(device.type, enabled=False):
        posterior = vae.encode(pixels.to(device, torch.float32)).latent_dist
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    scale = vae.config.scaling_factor
    return (posterior.mean - shift) * scale, posterior.std * scale
