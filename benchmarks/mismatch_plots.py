"""Plots with intervals, drawn with Pillow alone: matplotlib is not among the dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "base": (120, 120, 120),
    "sft": (40, 80, 220),
    "diffusion_dpo": (220, 35, 35),
    "dco": (230, 140, 20),
    "mapo_paper": (30, 140, 60),
    "mapo_official": (125, 50, 180),
}
_PALETTE = [*list(COLOURS.values())[1:], COLOURS["base"]]
_LEFT, _RIGHT, _TOP, _BOTTOM = 140, 190, 44, 60


@dataclass(frozen=True)
class Point:
    """A value with its interval; any of the places may be None where nothing was measured."""

    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Points of one name; `line` joins them."""

    name: str
    points: Sequence[Point]
    line: bool = False


def plot(
    title: str,
    series: Sequence[Series],
    x_ticks: Sequence[tuple[float, str]],
    x_title: str,
    y_title: str,
    size: tuple[int, int] = (900, 460),
) -> Image.Image:
    """Points and their intervals; the vertical axis spans all intervals and zero."""
    width, height = size
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(size=14), ImageFont.load_default(size=12)
    points = [p for s in series for p in s.points]
    low, high = min([0.0, *(p.low for p in points)]), max([0.1, *(p.high for p in points)])
    xs = [*(x for x, _ in x_ticks), *(p.x for p in points)]
    x_low, x_high = min(xs), max(xs)
    margin = 0.08 * (x_high - x_low or 1)
    x_low, x_high = x_low - margin, x_high + margin

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - low) / (high - low)
        return _LEFT + across * (width - _LEFT - _RIGHT), height - _BOTTOM - up * (height - _TOP - _BOTTOM)

    draw.text((_LEFT, 8), title, fill="black", font=font)
    step = next(s for s in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 1e9) if (high - low) / s <= 8)
    n = int(low / step) - 1
    while n * step <= high:
        if n * step >= low:
            _, y = at(x_low, n * step)
            draw.line([(_LEFT, y), (width - _RIGHT, y)], fill=(90, 90, 90) if n == 0 else (225, 225, 225))
            draw.text((_LEFT - 8, y), f"{n * step:g}", fill="black", font=small, anchor="rm")
        n += 1
    right, row = -1.0, 0  # where the last name ends; one that would cover it stands a line lower
    for x, name in sorted(x_ticks):
        place, _ = at(x, low)
        half = small.getlength(name) / 2
        row = 1 - row if place - half < right + 6 else 0
        right = place + half
        foot = height - _BOTTOM + 4 + 15 * row
        draw.line([(place, height - _BOTTOM), (place, foot)], fill="black")
        draw.text((place, foot + 4), name, fill="black", font=small, anchor="ma")
    draw.text(((_LEFT + width - _RIGHT) / 2, height - 24), x_title, fill="black", font=small, anchor="ma")
    draw.text((_LEFT - 8, _TOP - 10), y_title, fill="black", font=small, anchor="rm")
    for k, one in enumerate(series):
        colour = COLOURS.get(one.name, _PALETTE[k % len(_PALETTE)])
        places = [at(p.x, p.y) for p in one.points]
        if one.line and len(places) > 1:
            draw.line(places, fill=colour, width=2)
        for point, (x, y) in zip(one.points, places, strict=True):
            top, bottom = at(point.x, point.high)[1], at(point.x, point.low)[1]
            draw.line([(x, top), (x, bottom)], fill=colour, width=2)
            for end in (top, bottom):
                draw.line([(x - 4, end), (x + 4, end)], fill=colour, width=2)
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        y = _TOP + 20 * k
        draw.ellipse([width - _RIGHT + 20, y, width - _RIGHT + 28, y + 8], fill=colour)
        draw.text((width - _RIGHT + 36, y - 3), one.name, fill="black", font=small)
    return image
