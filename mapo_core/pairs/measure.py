"""What the linter needs to know of an image, from one decoding."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from ..buckets import Size

_THUMBNAIL = 64  # pixels
_GRID = 8  # cells of the signature per side
SIGNATURE = 3 * _GRID**2 + 1  # values of a signature
_SHARPNESS_CROP = 512  # pixels of the training image
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_MIN_CONTRAST = 8 / 255
_MEAN_WEIGHT = 1.6  # a mean level that differs by 1/16 weighs as much as the largest distance of near duplicates, 0.1


@dataclass(frozen=True)
class ImageFacts:
    """Measures of one image.

    Attributes:
        size: (width, height), upright, pixels.
        pixels: hash of size and pixels; equal for equal pictures, whatever the file format.
        signature: float32 [193]; what the picture looks like from afar, see `signature`.
        brightness: mean luma, 0-1.
        saturation: mean distance between the strongest and the weakest colour channel, 0-1.
        sharpness: log2 of the energy of fine detail over the contrast, at the training scale.
    """

    size: Size
    pixels: bytes
    signature: np.ndarray
    brightness: float
    saturation: float
    sharpness: float


def measure(image: Image.Image, resolution: int) -> ImageFacts:
    """Measure an RGB image that is trained at `resolution`."""
    thumbnail = image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX, reducing_gap=2.0)
    small = np.asarray(thumbnail, dtype=np.float32) / 255  # [64, 64, 3]
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    digest.update(image.tobytes())
    return ImageFacts(
        size=image.size,
        pixels=digest.digest(),
        signature=signature(small),
        brightness=float((small @ _LUMA).mean()),
        saturation=float((small.max(axis=2) - small.min(axis=2)).mean()),
        sharpness=_sharpness(image, resolution),
    )


def signature(small: np.ndarray) -> np.ndarray:
    """The picture as 8 x 8 cells of colour, free of brightness and contrast, and its mean level.

    Like a difference hash it survives scaling, recompression and slight changes of tone, but it keeps colour, without
    which drawings on plain grounds are taken for each other. The root mean square distance of two signatures is that of
    the cells in units of the picture's own contrast.

    Args:
        small: float32 [64, 64, 3], 0-1.

    Returns:
        float32 [193], scaled so that the Euclidean distance is that root mean square.
    """
    side = _THUMBNAIL // _GRID
    cells = small.reshape(_GRID, side, _GRID, side, 3).mean(axis=(1, 3)).ravel()  # [192]
    mean = cells.mean()
    centred = (cells - mean) / max(float(cells.std()), _MIN_CONTRAST)
    return np.append(centred / math.sqrt(cells.size), _MEAN_WEIGHT * mean).astype(np.float32)


def _sharpness(image: Image.Image, resolution: int) -> float:
    """Fine detail in the middle of the image, as large as it is trained: enlarged images are soft."""
    scale = resolution / min(image.size)
    side = max(8, min(_SHARPNESS_CROP, resolution))
    half = min(side / scale, *image.size) / 2
    x, y = image.size[0] / 2, image.size[1] / 2
    box = (x - half, y - half, x + half, y + half)
    grey = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box).convert("L"), dtype=np.float32)
    laplacian = 4 * grey[1:-1, 1:-1] - grey[:-2, 1:-1] - grey[2:, 1:-1] - grey[1:-1, :-2] - grey[1:-1, 2:]
    return math.log2((float(laplacian.var()) + 1) / (float(grey.var()) + 1))
