"""Pictures from the base model and from the LoRA, same seeds, and the sheets that show them side by side."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from .adapter import adapter_off
from .families._clip import stack_embeds
from .pictures import contact_sheet, save_image, save_pictures  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

    from .families.base import DiffusionModel, Family

_BATCH_PIXELS = 512 * 512  # pictures made together have at most about this many pixels


@torch.no_grad()
def sample_images(
    model: DiffusionModel,
    family: Family,
    prompts: Sequence[dict[str, Tensor]],
    negative: dict[str, Tensor],
    seeds: Sequence[int],
    *,
    width: int,
    height: int,
    num_inference_steps: int,
    guidance_scale: float,
    base: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Image.Image]:
    """One picture per prompt; the noise comes from its seed on the CPU and does not depend on the others.

    Args:
        model: with its VAE; text encoders are not needed.
        family: of the model.
        prompts: N encoded prompts, as `Family.encode_prompts` gives them.
        negative: the encoded negative prompt.
        seeds: N seeds.
        width, height: pixels.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance; 1 or less is without.
        base: with the adapter switched off, if there is one.
        autocast: context of the arithmetic, as the trainer uses it.
        progress: called with pictures done and pictures in all.
    """
    pipe = family.pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    assert model.vae is not None
    home = next(model.vae.parameters()).device
    model.vae.to(model.device)
    was_training = model.unet.training
    model.unet.eval()
    size = max(1, min(32, _BATCH_PIXELS // (width * height)))
    images: list[Image.Image] = []
    try:
        with adapter_off(model.unet) if base else nullcontext():
            for start in range(0, len(prompts), size):
                part = list(prompts[start : start + size])
                arguments = _embeds(model, part, negative)
                generators = [torch.Generator().manual_seed(s) for s in seeds[start : start + size]]
                with autocast():
                    latents = pipe(
                        **arguments,
                        width=width,
                        height=height,
                        num_inference_steps=num_inference_steps,
                        guidance_scale=guidance_scale,
                        generator=generators,
                        output_type="latent",
                    ).images
                images += decode(model, latents)
                progress(len(images), len(prompts))
    finally:
        model.unet.train(was_training)
        model.vae.to(home)
    return images


def decode(model: DiffusionModel, latents: Tensor) -> list[Image.Image]:
    """Scaled latents [B, 4, h, w] to pictures, in the VAE's own precision."""
    vae: Any = model.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    pictures: list[Image.Image] = []
    for one in latents.split(max(1, _BATCH_PIXELS // (latents[0, 0].numel() * model.latent_scale**2))):
        pixels = vae.decode(one.to(vae.dtype) / vae.config.scaling_factor + shift).sample
        array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        pictures += [Image.fromarray(a) for a in array]
    return pictures


def _embeds(model: DiffusionModel, prompts: list[dict[str, Tensor]], negative: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pipeline's arguments: every prompt and the negative one, brought to one length."""
    dtype = next(model.unet.parameters()).dtype
    arguments: dict[str, Tensor] = {}
    for name in prompts[0]:
        values = [negative[name], *(p[name] for p in prompts)]
        stacked = stack_embeds(values) if values[0].ndim == 2 else torch.stack(values)
        stacked = stacked.to(model.device, dtype)
        arguments[name] = stacked[1:]
        arguments[f"negative_{name}"] = stacked[:1].expand_as(stacked[1:])
    return arguments
