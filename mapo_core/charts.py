"""Charts of a run as pictures: loss, margin and held-out accuracy over the steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from .runs import run_history

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .runs import RunDir

_INK, _FAINT, _GRID, _BACK = (225, 225, 225), (150, 150, 150), (58, 58, 58), (28, 28, 30)
_COLOURS = {"loss": (120, 190, 255), "margin": (255, 190, 90), "accuracy": (140, 220, 140), "base": (120, 120, 120)}

Points = list[tuple[float, float]]


def run_chart(run: RunDir, width: int = 900, height: int = 720) -> Image.Image:
    """Three panels: loss, margin, and accuracy on held-out pairs with the base model's as a grey line.

    A panel without values says so. The thin line is the value of each step, the thick one its running mean.
    """
    history = run_history(run)
    image = Image.new("RGB", (width, height), _BACK)
    draw = ImageDraw.Draw(image)
    font, title = ImageFont.load_default(size=18), ImageFont.load_default(size=24)
    draw.text((16, 10), run.name, fill=_INK, font=title)
    top, gap = 50, 14
    panel = (height - top - 2 * gap) // 3
    last = max([*history.steps, *(e["step"] for e in history.evaluated), 1])
    accuracy = [(e["step"], e["accuracy"]) for e in history.evaluated if e.get("accuracy") is not None]
    base = next((e["base"]["accuracy"] for e in history.evaluated if e.get("base")), None)
    panels = (
        ("loss", "loss", _points(history.steps, history.curves["loss"]), None),
        ("margin", "margin: rejected error minus chosen error", _points(history.steps, history.curves["margin"]), 0.0),
        ("accuracy", "accuracy on held-out pairs (grey: base model)", accuracy, base),
    )
    for number, (name, label, points, level) in enumerate(panels):
        y = top + number * (panel + gap)
        box = (92, y + 36, width - 24, y + panel - 26)
        draw.text((16, y), label, fill=_COLOURS[name], font=font)
        _panel(draw, box, points, last, _COLOURS[name], level, font, bounds=(0.0, 1.0) if name == "accuracy" else None)
    return image


def _points(steps: Sequence[int], values: Sequence[float | None]) -> Points:
    return [(s, v) for s, v in zip(steps, values, strict=True) if v is not None and math.isfinite(v)]


def _panel(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    points: Points,
    last: int,
    colour: tuple[int, int, int],
    level: float | None,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    bounds: tuple[float, float] | None,
) -> None:
    """One curve in a box, with its axes; `level` is a horizontal line."""
    left, top, right, bottom = box
    draw.rectangle(box, outline=_GRID)
    if not points:
        draw.text((left + 8, top + 6), "no values yet", fill=_FAINT, font=font)
        return
    values = [v for _, v in points] + ([level] if level is not None else [])
    low, high = bounds or (min(values), max(values))
    room = (high - low) * 0.05 or abs(high) * 0.05 or 0.5
    low, high = (low, high) if bounds else (low - room, high + room)

    def place(step: float, value: float) -> tuple[float, float]:
        return (
            left + (right - left) * step / max(last, 1),
            bottom - (bottom - top) * (min(max(value, low), high) - low) / (high - low),
        )

    for share in (0.0, 0.5, 1.0):
        value = low + share * (high - low)
        y = bottom - share * (bottom - top)
        draw.line((left, y, right, y), fill=_GRID)
        draw.text((left - 6, y), f"{value:.3g}", fill=_FAINT, font=font, anchor="rm")
        draw.text(
            (left + share * (right - left), bottom + 3), str(round(share * last)), fill=_FAINT, font=font, anchor="ma"
        )
    if level is not None:
        y = place(0, level)[1]
        draw.line((left, y, right, y), fill=_COLOURS["base"], width=2)
    raw = [place(*p) for p in points]
    if len(points) <= 30:
        draw.line(raw, fill=colour, width=3, joint="curve")
        for x, y in raw:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        return
    draw.line(raw, fill=tuple(c // 2 for c in colour), width=1)
    draw.line([place(*p) for p in _running_mean(points)], fill=colour, width=3, joint="curve")


def _running_mean(points: Points) -> Points:
    """Mean over a twentieth of the curve around each point."""
    reach = max(1, len(points) // 40)
    smooth: Points = []
    for i, (step, _) in enumerate(points):
        part = points[max(0, i - reach) : i + reach + 1]
        smooth.append((step, sum(v for _, v in part) / len(part)))
    return smooth
