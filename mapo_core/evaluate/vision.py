"""Pictures to pixel tensors for the scorers' vision models, by Pillow alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Fitting = Literal["crop", "squash", "pad"]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF_MEAN, HALF_STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def pixel_values(
    images: Sequence[Image.Image],
    side: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    *,
    resize: int | None = None,
    fitting: Fitting = "crop",
) -> Tensor:
    """[N, 3, side, side] float32, normalised.

    Args:
        images: pictures of any size.
        side: of the model's input, pixels.
        mean, std: of the normalisation, for values 0-1.
        resize: length that the shorter side is brought to before the middle is cut out; None: `side`.
        fitting: "crop" cuts the middle out; "squash" brings both sides to `side`; "pad" brings the longer side to it
            and fills up with black.
    """
    arrays = [np.asarray(_fitted(im.convert("RGB"), side, resize or side, fitting), dtype=np.float32) for im in images]
    x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _fitted(image: Image.Image, side: int, resize: int, fitting: Fitting) -> Image.Image:
    bicubic = Image.Resampling.BICUBIC
    if fitting == "squash":
        return image.resize((side, side), bicubic)
    if fitting == "pad":
        scale = side / max(image.size)
        image = image.resize((round(image.width * scale) or 1, round(image.height * scale) or 1), bicubic)
        canvas = Image.new("RGB", (side, side))
        canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return canvas
    scale = resize / min(image.size)
    width, height = (max(resize, int(length * scale)) for length in image.size)
    image = image.resize((width, height), bicubic)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))
