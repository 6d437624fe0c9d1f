"""The published MaPO recipe, written from its description, to be timed against the engine; it saves nothing.

At every step the VAE (in float32) encodes both images and both text encoders the prompts; one joint forward pass of
chosen and rejected images; the LoRA has rank 8 and the weights of the mixed precision (bfloat16 on a GPU); gradient
checkpointing is on; the optimizer is 8-bit Adam; the loss and three metrics are read from the device one by one.
Reading and tokenizing are left out: images and token ids lie in memory, which is in the recipe's favour.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from mapo_core.methods.diffusion_dpo import DiffusionDPOLoss
from mapo_core.methods.mapo import MaPOLoss

LORA_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class Recipe:
    """A model, its optimizer and the pictures, ready to step.

    Attributes:
        method: "mapo", "sft" or "diffusion_dpo".
        images: pairs as pixels in [-1, 1], [pairs, 2, 3, H, W], on the CPU.
        ids: token ids of the prompts for both text encoders, [pairs, 77] each.
        mixed: the precision of the arithmetic.
    """

    method: str
    unet: Any
    vae: Any
    text_encoders: list[Any]
    noise_scheduler: Any
    optimizer: Any
    parameters: list[torch.nn.Parameter]
    images: Tensor
    ids: list[Tensor]
    device: torch.device
    mixed: torch.dtype
    batch_size: int
    resolution: int
    position: int = 0

    def step(self) -> float:
        """One optimizer step on `batch_size` pairs; its loss."""
        rows = [(self.position + i) % len(self.images) for i in range(self.batch_size)]
        self.position += self.batch_size
        sides = (0,) if self.method == "sft" else (0, 1)
        pixels = torch.cat([self.images[rows, side] for side in sides]).to(self.device)  # [B or 2B, 3, H, W]
        latents, embeds, pooled = self.encode(pixels, rows)
        latents, embeds = latents.to(self.mixed), embeds.repeat(len(sides), 1, 1)
        noise = torch.randn_like(latents[: len(rows)]).repeat(len(sides), 1, 1, 1)
        levels = self.noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, levels, (len(rows),), device=self.device).repeat(len(sides))
        noisy = self.noise_scheduler.add_noise(latents, noise, timesteps)
        time_ids = torch.tensor([[self.resolution, self.resolution, 0, 0, self.resolution, self.resolution]])
        conditions = {
            "text_embeds": pooled.repeat(len(sides), 1),
            "time_ids": time_ids.to(self.device, self.mixed).repeat(len(latents), 1),
        }
        errors = self.errors(noisy, timesteps, embeds, conditions, noise)
        if self.method == "diffusion_dpo":
            self.unet.disable_adapters()
            with torch.no_grad():
                reference = self.errors(noisy, timesteps, embeds, conditions, noise)
            self.unet.enable_adapters()
            loss, metrics = DiffusionDPOLoss()(*errors.chunk(2), *reference.chunk(2))
        elif self.method == "mapo":
            loss, metrics = MaPOLoss("official")(*errors.chunk(2))
        else:
            loss, metrics = errors, {}
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for value in metrics.values():  # each waits for the device
            value.mean().item()
        return loss.mean().item()

    @torch.no_grad()
    def encode(self, pixels: Tensor, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Latents of the images, states [B, 77, C] and projection of the prompts."""
        parts = [self.vae.encode(p).latent_dist.sample() for p in pixels.float().split(8)]
        states: list[Tensor] = []
        pooled = None
        for encoder, ids in zip(self.text_encoders, self.ids, strict=True):
            output = encoder(ids[rows].to(self.device), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled = output[0]
        assert pooled is not None
        return torch.cat(parts) * self.vae.config.scaling_factor, torch.cat(states, dim=-1), pooled

    def errors(
        self, noisy: Tensor, timesteps: Tensor, embeds: Tensor, conditions: dict[str, Tensor], noise: Tensor
    ) -> Tensor:
        """Squared errors of every image, [B or 2B] float32."""
        cast = self.mixed != torch.float32
        with torch.autocast(self.device.type, self.mixed) if cast else nullcontext():
            predicted = self.unet(noisy, timesteps, embeds, added_cond_kwargs=conditions, return_dict=False)[0]
        return functional.mse_loss(predicted.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))


def build_recipe(
    model: Path,
    pairs: list[dict[str, str]],
    *,
    method: str,
    device: torch.device,
    batch_size: int,
    resolution: int,
    checkpointing: bool = True,
) -> Recipe:
    """Load everything as the recipe does, on the device and there for good."""
    from bitsandbytes.optim import AdamW8bit
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    mixed = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=mixed)
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32)
    encoders = [
        CLIPTextModel.from_pretrained(model, subfolder="text_encoder", torch_dtype=mixed),
        CLIPTextModelWithProjection.from_pretrained(model, subfolder="text_encoder_2", torch_dtype=mixed),
    ]
    for part in (unet, vae, *encoders):
        part.requires_grad_(False).to(device)
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=LORA_LAYERS))
    unet.to(device, mixed)  # the LoRA's weights, too
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    pixels = [
        torch.stack([torch.from_numpy(np.array(Image.open(pair[side]).convert("RGB"))) for side in SIDES])
        for pair in pairs
    ]
    tokenizers = [CLIPTokenizer.from_pretrained(model, subfolder=name) for name in ("tokenizer", "tokenizer_2")]
    prompts = [pair["prompt"] for pair in pairs]
    return Recipe(
        method=method,
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        noise_scheduler=DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        optimizer=AdamW8bit(parameters, lr=1e-5, weight_decay=0.01),
        parameters=parameters,
        images=torch.stack(pixels).permute(0, 1, 4, 2, 3).float() / 127.5 - 1,
        ids=[
            t(prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
            for t in tokenizers
        ],
        device=device,
        mixed=mixed,
        batch_size=batch_size,
        resolution=resolution,
    )


SIDES = ("chosen", "rejected")
