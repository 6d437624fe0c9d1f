"""Reading images of every kind as upright RGB, and fitting them to a bucket."""

from __future__ import annotations

import re
import struct
import threading
import unicodedata
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from ..errors import PairsError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..buckets import Fit, Size

Colour = tuple[int, int, int]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 89_478_485
"""Pillow's `MAX_IMAGE_PIXELS`, at which it only warns and which others in the same process may have lifted."""

_WHITE: Colour = (255, 255, 255)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TooManyPixelsError(PairsError):
    """An image is so large that opening it may exhaust the memory."""


class UnreadableImageError(PairsError):
    """A file is missing, damaged or not an image."""


def list_images(folder: Path, recursive: bool = True) -> list[Path]:
    """Images below a folder, in natural order (2 before 10); hidden files and folders are passed over.

    Raises:
        PairsError: there is no such folder.
    """
    return [path for path in list_files(folder, recursive) if path.suffix.lower() in IMAGE_SUFFIXES]


def list_files(folder: Path, recursive: bool = True) -> list[Path]:
    """Files below a folder, in natural order, without hidden ones and the resource forks of macOS archives.

    Raises:
        PairsError: there is no such folder.
    """
    if not folder.is_dir():
        raise PairsError(f"There is no folder {folder}. Check the path.")
    found = folder.rglob("*") if recursive else folder.iterdir()
    relative = [path.relative_to(folder) for path in found if path.is_file()]
    seen = [path for path in relative if not any(p.startswith(".") or p == "__MACOSX" for p in path.parts)]
    return [folder / path for path in sorted(seen, key=_natural)]


def _natural(path: Path) -> tuple[tuple[tuple[int, int, str], ...], str]:
    text = unicodedata.normalize("NFC", path.with_suffix("").as_posix())
    parts = re.split(r"([0-9]+)", text)
    return tuple((0, int(p), "") if p[0] in "0123456789" else (1, 0, p.casefold()) for p in parts if p), path.as_posix()


def image_size(path: Path) -> Size:
    """(width, height) of the upright image, read from its header, pixels.

    Raises:
        PairsError: the file is missing, is not an image, or has too many pixels.
    """
    with open_header(path) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)


def load_image(path: Path, background: Colour = _WHITE) -> Image.Image:
    """The upright image in 8-bit RGB; the first frame of an animation; transparency laid on `background`.

    Raises:
        PairsError: the file is missing, damaged or not an image, or has too many pixels.
    """
    with open_header(path) as image, _no_truncation():
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image, background)
        return rgb if upright is None else rgb.transpose(upright)


def load_alpha(path: Path) -> Image.Image:
    """How opaque the upright image is, 8-bit greyscale; white all over where it has no transparency.

    Raises:
        PairsError: the file is missing, damaged or not an image, or has too many pixels.
    """
    with open_header(path) as image, _no_truncation():
        image.load()
        upright = _UPRIGHT.get(_orientation(image))
        alpha = (
            image.convert("RGBA").getchannel("A") if image.has_transparency_data else Image.new("L", image.size, 255)
        )
        return alpha if upright is None else alpha.transpose(upright)


def prepare_image(path: Path, fit: Fit, bucket: Size, flip: bool = False) -> np.ndarray:
    """The image as it is trained on: scaled, cropped, and mirrored if `flip`.

    Args:
        path: the image.
        fit: from `buckets.fit`, for this image's size.
        bucket: (width, height), pixels.
        flip: mirror left and right, after the crop.

    Returns:
        uint8 [H, W, 3].

    Raises:
        PairsError: as `load_image`.
    """
    image = load_image(path)
    if image.size != fit.resized:
        image = image.resize(fit.resized, Image.Resampling.LANCZOS)
    image = image.crop((fit.left, fit.top, fit.left + bucket[0], fit.top + bucket[1]))
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(image)  # [H, W, 3]


@contextmanager
def open_header(path: Path) -> Iterator[Image.Image]:
    """The image with only its header read; whatever Pillow raises inside becomes a PairsError that names the file.

    Raises:
        PairsError: the file is missing, damaged or not an image, or has too many pixels.
    """
    try:
        with Image.open(path) as image:
            _refuse_bomb(path, image.size)
            yield image
    except PairsError:
        raise
    except FileNotFoundError:
        raise UnreadableImageError(f"Image is missing: {path}. Fix the folder and scan again.") from None
    except Image.DecompressionBombError:  # from twice Pillow's limit on, before the size can be read
        raise TooManyPixelsError(_too_many(path, "")) from None
    except UnidentifiedImageError:
        raise UnreadableImageError(
            f"Not an image that can be read: {path}. It is damaged or of another kind than its name says; save it "
            "again as PNG or JPEG, or remove it."
        ) from None
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise UnreadableImageError(f"Cannot read {path}: {error.strerror}. Check the file.") from error
        raise UnreadableImageError(
            f"Image cannot be decoded: {path} ({error}). It is truncated, damaged or of an unusual kind; copy it again "
            "from where it came, or save it as 8-bit RGB PNG."
        ) from error


def _refuse_bomb(path: Path, size: Size) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise TooManyPixelsError(_too_many(path, f" ({size[0]} x {size[1]})"))


def _too_many(path: Path, size: str) -> str:
    return (
        f"Image has more than {MAX_PIXELS / 1e6:.0f} million pixels{size}: {path}. It was not opened, because that can "
        "exhaust the memory; make it smaller or remove it."
    )


def read_exif(image: Image.Image) -> Image.Exif:
    """The EXIF block; a damaged one counts as empty, as in every viewer."""
    try:
        return image.getexif()
    except (SyntaxError, ValueError, OSError, struct.error):
        return Image.Exif()


def _orientation(image: Image.Image) -> int:
    value = read_exif(image).get(_ORIENTATION)
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def _to_rgb(image: Image.Image, background: Colour) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow gives some of them as 32-bit integers
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integers")
        return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is not known")
    if image.has_transparency_data:
        flat = Image.new("RGBA", image.size, (*background, 255))
        flat.alpha_composite(image.convert("RGBA"))
        return flat.convert("RGB")
    return image.convert("RGB")


class _Strictness:
    """How many threads need truncated files to be errors, and what the flag was before the first of them."""

    lock = threading.Lock()
    users = 0
    before = False


@contextmanager
def _no_truncation() -> Iterator[None]:
    """Truncated files are errors in here. Several ComfyUI packs make Pillow accept them in the whole process."""
    with _Strictness.lock:
        if _Strictness.users == 0:
            _Strictness.before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
        _Strictness.users += 1
    try:
        yield
    finally:
        with _Strictness.lock:
            _Strictness.users -= 1
            if _Strictness.users == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _Strictness.before
