"""Masks: which part of an image counts. Files beside the images, and the images' own transparency."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import PairsError
from .images import load_alpha, load_image, open_header

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from ..buckets import Fit, Size

MASK_ENDING = "-masklabel"
"""`cat-masklabel.png` is the mask of `cat.png`, as OneTrainer has it."""


def is_mask(path: Path) -> bool:
    """Whether a file's name says that it is another image's mask."""
    return path.stem.endswith(MASK_ENDING)


def masks_of(files: Iterable[Path]) -> dict[Path, Path]:
    """The mask of each image among some files; masks without an image are left out."""
    files = list(files)
    images = {file.with_suffix(""): file for file in files if not is_mask(file)}
    found = {images.get(f.with_name(f.stem.removesuffix(MASK_ENDING))): f for f in files if is_mask(f)}
    return {image: mask for image, mask in found.items() if image is not None}


def has_transparency(path: Path) -> bool:
    """Whether an image can have transparent parts; only its header is read.

    Raises:
        PairsError: the file is missing or not an image.
    """
    with open_header(path) as image:
        return image.has_transparency_data


def mask_grid(path: Path, fit: Fit, bucket: Size, cell: int, *, alpha: bool = False) -> np.ndarray:
    """How much of each latent counts: the mask scaled and cropped like its image, then the mean of every cell.

    Args:
        path: a greyscale image; of a colour image the luma counts, and what is transparent is black.
        fit: of the image to its bucket.
        bucket: (width, height), pixels.
        cell: pixels per latent.
        alpha: take the transparency of the image at `path`: what is opaque counts.

    Returns:
        float32 [h, w], 0-1.

    Raises:
        PairsError: the mask cannot be read, or it is black everywhere in the crop.
    """
    mask = load_alpha(path) if alpha else load_image(path, background=(0, 0, 0)).convert("L")
    if mask.size != fit.resized:
        mask = mask.resize(fit.resized, Image.Resampling.BILINEAR)
    mask = mask.crop((fit.left, fit.top, fit.left + bucket[0], fit.top + bucket[1]))
    values = np.asarray(mask, dtype=np.float32) / 255  # [H, W]
    if not values.any():
        what = "The image is transparent" if alpha else "The mask is black"
        raise PairsError(
            f"{what} everywhere in the part that is trained: {path}. Nothing of its image would count; paint white "
            "what should, remove the mask, or set loss.mask to 'off'."
        )
    height, width = bucket[1] // cell, bucket[0] // cell
    return np.ascontiguousarray(values.reshape(height, cell, width, cell).mean(axis=(1, 3)))
