"""Pictures side by side, and pictures on disk."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from .runs import write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .pairs import PreferencePair


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
        text = " ".join(caption.split())  # a line break cannot be measured
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


def pair_sheet(pairs: Sequence[PreferencePair], count: int = 8, tile: int = 192) -> Image.Image:
    """Some pairs, spread over the set: the chosen images above, the rejected ones below, prompts over the columns.

    Args:
        pairs: at least one.
        count: how many are shown.
        tile: side of the square that each image is fitted into, pixels.
    """
    from .pairs import load_image

    step = max(1.0, len(pairs) / count)
    shown = [pairs[int(i * step)] for i in range(min(count, len(pairs)))]
    rows = [[_fitted(load_image(getattr(p, side)), tile) for p in shown] for side in ("chosen", "rejected")]
    return contact_sheet(rows, ["chosen", "rejected"], [p.prompt for p in shown], tile)


def _fitted(picture: Image.Image, side: int) -> Image.Image:
    """A picture in a square; a small one is enlarged without smoothing."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    square = Image.new("RGB", (side, side), "white")
    resample = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    square.paste(picture.convert("RGB").resize(size, resample), ((side - size[0]) // 2, (side - size[1]) // 2))
    return square
