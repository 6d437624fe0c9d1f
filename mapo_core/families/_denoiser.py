"""Run the denoiser of a family, and put its modules into a diffusers pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # pyright: ignore[reportPrivateImportUsage]
from diffusers.image_processor import VaeImageProcessor

from ._clip import stack_embeds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .base import DiffusionModel, ImageGeometry


def conditions_sd15(prompts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`prompt_embeds` [B, T, 768]."""
    return {"prompt_embeds": stack_embeds([p["prompt_embeds"] for p in prompts])}


def conditions_sdxl(prompts: Sequence[dict[str, Tensor]], geometry: Sequence[ImageGeometry]) -> dict[str, Tensor]:
    """`prompt_embeds` [B, T, 2048], `pooled_prompt_embeds` [B, 1280], `add_time_ids` [B, 6] in float32."""
    time_ids = [(*g.original_size, *g.crop_top_left, *g.target_size) for g in geometry]
    return {
        "prompt_embeds": stack_embeds([p["prompt_embeds"] for p in prompts]),
        "pooled_prompt_embeds": torch.stack([p["pooled_prompt_embeds"] for p in prompts]),
        "add_time_ids": torch.tensor(time_ids, dtype=torch.float32, device=prompts[0]["prompt_embeds"].device),
    }


def predict(model: DiffusionModel, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """The UNet's output [B, 4, h, w] in float32; SDXL's extra conditions are passed where there are some."""
    dtype = next(model.unet.parameters()).dtype  # conv_in's, which never gets a LoRA
    added = None
    if "add_time_ids" in conditions:
        # The sizes stay float32 until the UNet has made sinusoids of them: 1025 would become 1024 in bfloat16.
        added = {"text_embeds": conditions["pooled_prompt_embeds"].to(dtype), "time_ids": conditions["add_time_ids"]}
    output = model.unet(
        noisy_latents.to(dtype),
        timesteps,
        encoder_hidden_states=conditions["prompt_embeds"].to(dtype),
        added_cond_kwargs=added,
        return_dict=False,
    )
    return output[0].float()


def pipeline_sd15(model: DiffusionModel) -> Any:
    """Without safety checker."""
    pipe = StableDiffusionPipeline(
        vae=model.vae,  # pyright: ignore[reportArgumentType]
        text_encoder=model.text_encoders[0] if model.text_encoders else None,  # pyright: ignore[reportArgumentType]
        tokenizer=model.tokenizers[0],
        unet=model.unet,  # pyright: ignore[reportArgumentType]
        scheduler=_fresh_scheduler(model),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    return _with_scale(pipe, model)


def pipeline_sdxl(model: DiffusionModel) -> Any:
    """Without watermark; an empty negative prompt is encoded like any other, as ComfyUI does."""
    first, second = model.text_encoders or (None, None)
    pipe = StableDiffusionXLPipeline(
        vae=model.vae,  # pyright: ignore[reportArgumentType]
        text_encoder=first,  # pyright: ignore[reportArgumentType]
        text_encoder_2=second,  # pyright: ignore[reportArgumentType]
        tokenizer=model.tokenizers[0],
        tokenizer_2=model.tokenizers[1],
        unet=model.unet,  # pyright: ignore[reportArgumentType]
        scheduler=_fresh_scheduler(model),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    return _with_scale(pipe, model)


def _fresh_scheduler(model: DiffusionModel) -> Any:
    """A scheduler keeps the state of its last picture; two pipelines must not share one."""
    return type(model.sampling_scheduler).from_config(model.sampling_scheduler.config)


def _with_scale(pipe: Any, model: DiffusionModel) -> Any:
    """Without a VAE, diffusers takes 8 pixels per latent for granted."""
    pipe.vae_scale_factor = model.latent_scale
    pipe.image_processor = VaeImageProcessor(vae_scale_factor=model.latent_scale)
    return pipe
