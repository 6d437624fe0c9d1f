"""Captioned scenes drawn procedurally: the world that the demo model knows.

A scene is one or two coloured objects on a coloured background. `Scene.caption` says what is in it, `render` draws
it in one of four styles. Captions name the styles in `NAMED_STYLES`; the plain style is what no name means; the
demo model never sees `UNSEEN_STYLE`. `is_held_out` marks the combinations that training never draws.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from collections.abc import Iterator

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (45, 165, 60),
    "cyan": (50, 205, 215),
    "blue": (40, 80, 220),
    "purple": (125, 50, 180),
    "pink": (250, 120, 185),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (160, 160, 160),
    "red": (240, 178, 178),
    "yellow": (250, 240, 175),
    "green": (180, 222, 186),
    "blue": (178, 194, 242),
    "purple": (212, 184, 232),
}
# A background may not share its name with an object's colour in the same scene: the caption would be ambiguous to a
# viewer, and the object hard to see.
OBJECTS = ("circle", "square", "triangle", "star", "heart", "moon", "house", "tree", "fish", "boat")
STYLES = ("plain", "cartoon", "sticker", "neon")
NAMED_STYLES = ("cartoon", "sticker")
UNSEEN_STYLE = "neon"
SIZE = 64  # pixels
HELD_OUT_SHARE = 0.12

_BLACK = (24, 20, 30)
_WHITE = (255, 255, 255)
_WOOD = (115, 75, 42)

_RADIUS = {"": (16.0, 19.0), "big": (23.0, 26.0), "small": (10.0, 12.0)}  # pixels
_PLACE = {"": (0, 0), "on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1)}

_THING = f"an? (?:(?P<size>big|small) )?(?P<colour>{'|'.join(COLOURS)}) (?P<name>{'|'.join(OBJECTS)})"
_SECOND = f"an? (?P<colour2>{'|'.join(COLOURS)}) (?P<name2>{'|'.join(OBJECTS)})"
_CAPTION = re.compile(
    rf"{_THING}(?: (?P<place>{'|'.join(p for p in _PLACE if p)})| (?P<relation>left of|above) {_SECOND})?, "
    rf"(?P<background>{'|'.join(BACKGROUNDS)}) background(?:, (?:{'|'.join(NAMED_STYLES)}) style)?"
)

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Thing:
    """One object; centre and radius in pixels of the 64-pixel picture."""

    name: str
    colour: str
    x: float
    y: float
    radius: float
    size: str = ""
    place: str = ""


@dataclass(frozen=True)
class Scene:
    """What is drawn: one thing, or two whose `relation` is "left of" or "above"."""

    things: tuple[Thing, ...]
    background: str
    relation: str = ""

    @property
    def caption(self) -> str:
        """What the picture shows, without its style."""
        if len(self.things) == 1:
            thing = self.things[0]
            words = [thing.size, thing.colour, thing.name, thing.place]
            return f"{_with_article(words)}, {self.background} background"
        first, second = (_with_article([t.colour, t.name]) for t in self.things)
        return f"{first} {self.relation} {second}, {self.background} background"

    @property
    def combination(self) -> str:
        """The key by which combinations are held out: objects, colours and background, not size or place."""
        return "|".join([*(f"{t.colour} {t.name}" for t in self.things), self.background])


def _with_article(words: list[str]) -> str:
    text = " ".join(w for w in words if w)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def styled_caption(scene: Scene, style: str) -> str:
    """The caption with the style's name, if the style has one."""
    return f"{scene.caption}, {style} style" if style in NAMED_STYLES else scene.caption


def scene_of_caption(caption: str) -> Scene | None:
    """The scene that a caption describes, styled or not, as far as the caption says: places are nominal.

    Returns:
        None where the text is not of the form that `Scene.caption` writes.
    """
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        return None
    found = match.groupdict()
    size, place = found["size"] or "", found["place"] or ""
    first = Thing(found["name"], found["colour"], SIZE / 2, SIZE / 2, _RADIUS[size][0], size, place)
    if found["relation"] is None:
        return Scene((first,), found["background"])
    second = Thing(found["name2"], found["colour2"], SIZE / 2, SIZE / 2, _RADIUS[""][0])
    return Scene((first, second), found["background"], found["relation"])


def is_held_out(scene: Scene) -> bool:
    """Whether this combination of objects, colours and background is kept from training (by a hash, 12 %)."""
    digest = hashlib.sha256(scene.combination.encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32 < HELD_OUT_SHARE


def random_scene(rng: random.Random, two_objects: float = 0.45) -> Scene:
    """Draw a scene from the whole world, held-out combinations included."""
    background = rng.choice(list(BACKGROUNDS))
    colours = [c for c in COLOURS if c != background]
    if rng.random() >= two_objects:
        size = rng.choice(["", "", "big", "small"])
        place = rng.choice(list(_PLACE)) if size != "big" else ""
        radius = rng.uniform(*_RADIUS[size])
        dx, dy = _PLACE[place]
        reach = SIZE / 2 - radius - 2  # how far the centre may move from the middle, pixels
        x = SIZE / 2 + dx * reach * rng.uniform(0.8, 1.0) + (rng.uniform(-2, 2) if dx == 0 else 0)
        y = SIZE / 2 + dy * reach * rng.uniform(0.8, 1.0) + (rng.uniform(-2, 2) if dy == 0 else 0)
        thing = Thing(rng.choice(OBJECTS), rng.choice(colours), x, y, radius, size, place)
        return Scene((thing,), background)
    relation = rng.choice(["left of", "above"])
    things: list[Thing] = []
    for centre in (16.5, 47.5):
        along, across = centre + rng.uniform(-1.5, 1.5), SIZE / 2 + rng.uniform(-5, 5)
        x, y = (along, across) if relation == "left of" else (across, along)
        things.append(Thing(rng.choice(OBJECTS), rng.choice(colours), x, y, rng.uniform(12.5, 14.0)))
    return Scene(tuple(things), background, relation)


def scenes(seed: int, held_out: bool, two_objects: float = 0.45) -> Iterator[Scene]:
    """Endless scenes of the training world (`held_out=False`) or of the combinations kept from it."""
    rng = random.Random(seed)
    while True:
        scene = random_scene(rng, two_objects)
        if is_held_out(scene) == held_out:
            yield scene


def evaluation_scenes(count: int, seed: int, two_objects: float = 0.3) -> list[Scene]:
    """Held-out scenes with distinct captions, a fixed share of them with two objects."""
    pairs = round(count * two_objects)
    found: dict[str, Scene] = {}
    for wanted, share in ((count - pairs, 0.0), (pairs, 1.0)):
        before = len(found)
        for scene in scenes(seed, held_out=True, two_objects=share):
            if len(found) - before == wanted:
                break
            found.setdefault(scene.caption, scene)
    return list(found.values())


# --- drawing ---------------------------------------------------------------------------------------------------------


def _mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with `share` of `b` in it."""
    r, g, b_ = (round(x * (1 - share) + y * share) for x, y in zip(a, b, strict=True))
    return r, g, b_


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0.0, end: float = 360.0) -> list[Point]:
    steps = 40
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def _star() -> list[Point]:
    radii = [1.0 if i % 2 == 0 else 0.44 for i in range(10)]
    return [(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(radii)]


def _heart() -> list[Point]:
    points: list[Point] = []
    for i in range(40):
        t = i / 40 * 2 * math.pi
        x = 0.92 * math.sin(t) ** 3
        y = -0.06 * (13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        points.append((x, y))
    return points


def _moon() -> list[Point]:
    """A crescent that opens to the right: the outer arc, and back along an inner one."""
    outer = _ellipse(0.1, 0, 0.98, 0.98, 55, 305)
    inner = _ellipse(0.52, 0, 0.82, 0.80, 285, 75)
    return [*outer, *inner]


def parts(name: str, colour: Colour) -> list[tuple[list[Point], Colour]]:
    """An object as filled outlines, from back to front; coordinates in [-1, 1], y downwards."""
    dark, light = _mix(colour, (0, 0, 0), 0.35), _mix(colour, _WHITE, 0.6)
    if name == "circle":
        return [(_ellipse(0, 0, 0.92, 0.92), colour)]
    if name == "square":
        return [([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)], colour)]
    if name == "triangle":
        return [([(0, -0.95), (0.98, 0.8), (-0.98, 0.8)], colour)]
    if name == "star":
        return [(_star(), colour)]
    if name == "heart":
        return [(_heart(), colour)]
    if name == "moon":
        return [(_moon(), colour)]
    if name == "house":
        return [
            ([(-0.72, -0.15), (0.72, -0.15), (0.72, 0.95), (-0.72, 0.95)], light),
            ([(-0.98, -0.1), (0, -0.98), (0.98, -0.1)], colour),
            ([(-0.24, 0.3), (0.24, 0.3), (0.24, 0.95), (-0.24, 0.95)], dark),
        ]
    if name == "tree":
        return [
            ([(-0.2, 0.2), (0.2, 0.2), (0.2, 0.98), (-0.2, 0.98)], _WOOD),
            (_ellipse(0, -0.3, 0.78, 0.68), colour),
        ]
    if name == "fish":
        return [
            ([(0.3, 0), (0.98, -0.6), (0.98, 0.6)], dark),
            (_ellipse(-0.2, 0, 0.78, 0.58), colour),
            (_ellipse(-0.55, -0.12, 0.14, 0.14), _BLACK),
        ]
    if name == "boat":
        return [
            ([(-0.07, -0.95), (0.07, -0.95), (0.07, 0.4), (-0.07, 0.4)], _WOOD),
            ([(0.07, -0.9), (0.8, 0.25), (0.07, 0.25)], _WHITE),
            ([(-0.98, 0.35), (0.98, 0.35), (0.6, 0.92), (-0.6, 0.92)], colour),
        ]
    raise KeyError(name)


def _backdrop(background: str, style: str) -> Colour:
    colour = BACKGROUNDS[background]
    return _mix(colour, (12, 10, 30), 0.8) if style == "neon" else colour


def render(scene: Scene, style: str = "plain", size: int = SIZE) -> Image.Image:
    """Draw a scene.

    Args:
        scene: what to draw.
        style: one of `STYLES`.
        size: side of the square picture, pixels.

    Returns:
        RGB image of `size` x `size`.
    """
    supersampling = 3
    scale = supersampling * size / SIZE  # canvas pixels per scene pixel
    canvas = Image.new("RGB", (size * supersampling, size * supersampling), _backdrop(scene.background, style))
    draw = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _draw_thing(draw, thing, style, scale)
    return canvas.resize((size, size), Image.Resampling.BOX)


def _draw_thing(draw: ImageDraw.ImageDraw, thing: Thing, style: str, scale: float) -> None:
    outlines = [
        ([((thing.x + px * thing.radius) * scale, (thing.y + py * thing.radius) * scale) for px, py in points], colour)
        for points, colour in parts(thing.name, COLOURS[thing.colour])
    ]

    def stroke(points: list[Point], colour: Colour, width: float) -> None:
        draw.line([*points, points[0], points[1]], fill=colour, width=round(width * scale), joint="curve")

    if style == "sticker":  # a white rim around the whole object, with a shadow below it
        for points, _ in outlines:
            shadow = [(x + 1.2 * scale, y + 1.8 * scale) for x, y in points]
            draw.polygon(shadow, fill=(95, 95, 105))
            stroke(shadow, (95, 95, 105), 4.0)
        for points, _ in outlines:
            stroke(points, _WHITE, 4.4)
    for points, colour in outlines:
        if style == "neon":
            draw.polygon(points, fill=_mix(colour, (10, 8, 26), 0.78))
            stroke(points, _mix(colour, _WHITE, 0.12), 2.2)
        else:
            draw.polygon(points, fill=_mix(colour, _WHITE, 0.1) if style == "cartoon" else colour)
            if style == "cartoon":
                stroke(points, _BLACK, 2.2)
