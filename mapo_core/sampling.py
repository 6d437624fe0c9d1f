"""Pictures from the base model and from the LoRA, same seeds, and the sheets that show them side by side."""

from __future__ import annotations

import io
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont

from .adapter import adapter_off
from .families._clip import stack_embeds
from .runs import write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

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


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] = (), captions: Sequence[str] = (), tile: int = 256
) -> Image.Image:
    """Rows of pictures in one image, with a title before each row and a caption over each column.

    Args:
        rows: of pictures; all rows have the same length.
        titles: one per row, or none.
        captions: one per column, or none; shortened to the width of a picture.
        tile: longest side of a picture in the sheet, pixels; small pictures are enlarged without smoothing.
    """
    first = rows[0][0]
    scale = tile / max(first.size)
    if scale > 1:
        scale = max(1, int(scale))
    width, height = round(first.width * scale), round(first.height * scale)
    font = ImageFont.load_default(size=13)
    gap, left, top = 6, 110 if titles else 6, 24 if captions else 6
    sheet = Image.new("RGB", (left + len(rows[0]) * (width + gap), top + len(rows) * (height + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(captions):
        text = caption
        while text and draw.textlength(text, font=font) > width:
            text = text[:-2]
        draw.text((left + column * (width + gap), 5), text, fill="black", font=font)
    resample = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    for row, pictures in enumerate(rows):
        y = top + row * (height + gap)
        if titles:
            draw.text((6, y + 4), titles[row], fill="black", font=font)
        for column, picture in enumerate(pictures):
            sheet.paste(picture.resize((width, height), resample), (left + column * (width + gap), y))
    return sheet


def save_pictures(pictures: Sequence[Image.Image], folder: Path) -> None:
    """One PNG per picture, numbered."""
    for i, picture in enumerate(pictures):
        save_image(picture, folder / f"{i:02d}.png")


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG in one move, making its folder if needed."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())
