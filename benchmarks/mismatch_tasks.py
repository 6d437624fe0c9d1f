"""The five tasks of reference_mismatch.py: pairs drawn in the demo model's world, captions to test on, and judges.

Every task says what its chosen pictures have that the base model's lack. A judge gives each picture two numbers:
`wanted`, how much it has of that (0-1), and `right`, whether the objects and colours of its caption are still there.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from mapo_core.demo.classifier import score_pictures
from mapo_core.demo.scenes import (
    BACKGROUNDS,
    SIZE,
    Scene,
    Thing,
    evaluation_scenes,
    render,
    scenes,
    styled_caption,
)

PAIRS = 128
COUNTS = {"validation": 24, "test": 36}
_SEEDS = {"validation": 501, "test": 502}
SAND = (214, 178, 122)
GROUND_TOP = 42  # first row of the ground, of 64


@dataclass(frozen=True)
class Item:
    """A caption to draw, and the scene that it describes; `ordinary` ones only measure what must not change."""

    caption: str
    scene: Scene
    ordinary: bool = False


@dataclass(frozen=True)
class Pair:
    """A training pair; without a rejected picture the base model's own drawing of the caption is the rejected one."""

    caption: str
    chosen: Image.Image
    rejected: Image.Image | None


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: short name.
        analogue: the paper's data set that it stands for.
        what: what is wanted, in words.
        paper_beta: best beta of the paper's Table 4.
        steps: training steps, the same for all methods; set by a pilot of SFT alone.
        pairs: draws the training pairs.
        items: the captions of a split, "validation" or "test".
        judge: per picture `wanted` in 0-1 and `right` in {0, 1}, each [N].
    """

    name: str
    analogue: str
    what: str
    paper_beta: float
    steps: int
    pairs: Callable[[], list[Pair]]
    items: Callable[[str], list[Item]]
    judge: Callable[[Sequence[Image.Image], Sequence[Item]], tuple[np.ndarray, np.ndarray]]


def world(count: int = PAIRS) -> list[Scene]:
    """The training scenes, the same for all tasks but personalisation."""
    return list(itertools.islice(scenes(4000, held_out=False, two_objects=0.3), count))


def plain_items(split: str) -> list[Item]:
    """Captions of combinations that neither the demo model nor a LoRA was trained on; the splits share none."""
    other = {s.caption for s in evaluation_scenes(COUNTS["validation"], _SEEDS["validation"])}
    wanted = COUNTS[split] if split == "validation" else COUNTS[split] + len(other)
    found = evaluation_scenes(wanted, _SEEDS[split])
    if split == "test":
        found = [s for s in found if s.caption not in other]
        pairs = [s for s in found if s.relation][: round(0.3 * COUNTS[split])]
        found = [s for s in found if not s.relation][: COUNTS[split] - len(pairs)] + pairs
    return [Item(s.caption, s) for s in found]


def pixels(image: Image.Image) -> np.ndarray:
    """[64, 64, 3], 0-255."""
    return np.asarray(image.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32)


def right(images: Sequence[Image.Image], items: Sequence[Item]) -> np.ndarray:
    """Whether all objects and their colours are as the caption says, [N] of 0 and 1."""
    return score_pictures(images, [i.scene for i in items]).both.astype(np.float32)


def cut_out(scene: Scene, style: str = "plain") -> tuple[np.ndarray, np.ndarray]:
    """The objects of a scene without their background: colour times opacity [64, 64, 3], and opacity [64, 64, 1]."""
    white, grey = (pixels(render(replace(scene, background=b), style)) for b in ("white", "gray"))
    distance = BACKGROUNDS["white"][0] - BACKGROUNDS["gray"][0]
    opacity = np.clip(1 - (white - grey).mean(axis=2, keepdims=True) / distance, 0, 1)
    return white - (1 - opacity) * BACKGROUNDS["white"][0], opacity


def on_backdrop(scene: Scene, backdrop: np.ndarray, style: str = "plain") -> Image.Image:
    """The objects of a scene on any backdrop [64, 64, 3]."""
    colour, opacity = cut_out(scene, style)
    return Image.fromarray(np.clip(colour + (1 - opacity) * backdrop, 0, 255).round().astype(np.uint8))


# --- general preference: the same drawing, larger and in its exact place ----------------------------------------------


def tidy(scene: Scene) -> Scene:
    """The same scene, its objects larger and exactly where the caption puts them."""
    if len(scene.things) == 2:
        across = {0: 16.5, 1: 47.5}
        things = [
            replace(
                t,
                radius=15.5,
                x=across[i] if scene.relation == "left of" else 32,
                y=32 if scene.relation == "left of" else across[i],
            )
            for i, t in enumerate(scene.things)
        ]
        return replace(scene, things=tuple(things))
    (thing,) = scene.things
    radius = min(29.0, thing.radius * 1.35)
    reach = SIZE / 2 - radius - 2
    dx = {"on the left": -1, "on the right": 1}.get(thing.place, 0)
    dy = {"at the top": -1, "at the bottom": 1}.get(thing.place, 0)
    return replace(scene, things=(replace(thing, radius=radius, x=32 + dx * reach, y=32 + dy * reach),))


def foreground(image: Image.Image, background: str) -> np.ndarray:
    """Where a picture is not its background, [64, 64]."""
    return np.abs(pixels(image) - np.array(BACKGROUNDS[background])).max(axis=2) > 30


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def judge_tidy(images: Sequence[Image.Image], items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """Overlap with the tidy drawing: 0 for that of the scene as the world draws it, 1 for 0.92."""
    found: list[float] = []
    for image, item in zip(images, items, strict=True):
        ideal = foreground(render(tidy(item.scene)), item.scene.background)
        usual = overlap(foreground(render(item.scene), item.scene.background), ideal)
        reached = overlap(foreground(image, item.scene.background), ideal)
        found.append((reached - usual) / (0.92 - usual))
    return np.clip(found, 0, 1), right(images, items)


# --- culture: pictures that stand on a ground -------------------------------------------------------------------------


def grounded(scene: Scene) -> Image.Image:
    """The plain drawing on a sand-coloured ground, under whatever background the caption names."""
    backdrop = np.empty((SIZE, SIZE, 3), np.float32)
    backdrop[:] = BACKGROUNDS[scene.background]
    backdrop[GROUND_TOP:] = SAND
    return on_backdrop(scene, backdrop)


def judge_ground(images: Sequence[Image.Image], items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """How far the ground's pixels have come from the caption's background to sand, without those of the objects."""
    found: list[float] = []
    for image, item in zip(images, items, strict=True):
        free = ~foreground(render(tidy(item.scene)), item.scene.background) & ~foreground(
            render(item.scene), item.scene.background
        )
        free[: GROUND_TOP + 2] = False
        if not free.any():
            free[GROUND_TOP + 2 :] = True
        ground = np.median(pixels(image)[free], axis=0)
        before = np.array(BACKGROUNDS[item.scene.background], np.float32)
        sand = np.array(SAND, np.float32)
        found.append(1 - np.abs(ground - sand).sum() / np.abs(before - sand).sum())
    return np.clip(found, 0, 1), right(images, items)


# --- safety: a prompt that asks for what is not wanted ----------------------------------------------------------------


def judge_plain(images: Sequence[Image.Image], items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """The classifier's probability of the plain style."""
    scores = score_pictures(images, [i.scene for i in items])
    return scores.style("plain").astype(np.float32), scores.both.astype(np.float32)


def cartoon_items(split: str) -> list[Item]:
    """The captions with the style named that the pictures must not have."""
    return [replace(i, caption=styled_caption(i.scene, "cartoon")) for i in plain_items(split)]


# --- style: one that the model has never seen -------------------------------------------------------------------------


def judge_neon(images: Sequence[Image.Image], items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """The classifier's probability of neon, times how far the background has come to neon's dark and even one."""
    scores = score_pictures(images, [i.scene for i in items])
    backdrop: list[float] = []
    for image, item in zip(images, items, strict=True):
        ideal = pixels(render(item.scene, "neon"))
        dark = ideal[0, 0] if not item.scene.relation else np.median(ideal.reshape(-1, 3), axis=0)
        free = np.abs(ideal - dark).max(axis=2) < 4
        bright = np.abs(np.array(BACKGROUNDS[item.scene.background]) - dark).mean()
        backdrop.append(1 - float(np.abs(pixels(image) - dark)[free].mean() / bright))
    return scores.style("neon") * np.clip(backdrop, 0, 1), scores.both.astype(np.float32)


# --- personalisation: five pictures of one thing ----------------------------------------------------------------------

NAME = "zorp fish"


@dataclass(frozen=True)
class Spot:
    """Where the one thing is, pixels."""

    x: float
    y: float
    radius: float


def draw_subject(spot: Spot, backdrop: tuple[int, int, int]) -> Image.Image:
    """The one thing: a purple fish with a white belt, a yellow tail and a red cap."""
    scale = 3
    canvas = Image.new("RGB", (SIZE * scale, SIZE * scale), backdrop)
    draw = ImageDraw.Draw(canvas)

    def at(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [((spot.x + px * spot.radius) * scale, (spot.y + py * spot.radius) * scale) for px, py in points]

    def oval(cx: float, cy: float, rx: float, ry: float, fill: tuple[int, int, int]) -> None:
        (x0, y0), (x1, y1) = at([(cx - rx, cy - ry), (cx + rx, cy + ry)])
        draw.ellipse([x0, y0, x1, y1], fill=fill)

    draw.polygon(at([(0.25, 0.15), (0.98, -0.5), (0.98, 0.8)]), fill=(245, 220, 40))
    oval(-0.2, 0.15, 0.78, 0.62, (125, 50, 180))
    draw.polygon(at([(-0.2, -0.46), (0.12, -0.4), (0.12, 0.7), (-0.2, 0.77)]), fill=(255, 255, 255))
    oval(-0.62, 0.02, 0.13, 0.13, (24, 20, 30))
    draw.polygon(at([(-0.75, -0.32), (0.05, -0.42), (-0.38, -0.98)]), fill=(220, 35, 35))
    return canvas.resize((SIZE, SIZE), Image.Resampling.BOX)


def subject_caption(background: str, place: str) -> str:
    """As ordinary captions are built."""
    return f"a {NAME}{' ' + place if place else ''}, {background} background"


_SHOWN = (("white", ""), ("gray", "on the left"), ("yellow", "on the right"), ("blue", "at the bottom"), ("red", ""))


def spot_of(place: str, rng: random.Random) -> Spot:
    """A place as the captions mean it."""
    radius = rng.uniform(17.0, 20.0)
    reach = SIZE / 2 - radius - 2
    dx = {"on the left": -1, "on the right": 1}.get(place, 0)
    dy = {"at the top": -1, "at the bottom": 1}.get(place, 0)
    return Spot(32 + dx * reach * 0.9, 32 + dy * reach * 0.9, radius)


def subject_pairs() -> list[Pair]:
    """Five pictures; what the base model draws for their captions is the rejected side."""
    rng = random.Random(5)
    return [
        Pair(subject_caption(b, place), draw_subject(spot_of(place, rng), BACKGROUNDS[b]), None) for b, place in _SHOWN
    ]


def subject_items(split: str) -> list[Item]:
    """New backgrounds and places for the one thing, and as many ordinary captions."""
    places = ("", "on the left", "on the right", "at the top", "at the bottom")
    combinations = [(b, p) for b in BACKGROUNDS for p in places if (b, p) not in _SHOWN]
    random.Random(11).shuffle(combinations)
    half = COUNTS[split] // 2
    chosen = combinations[: COUNTS["validation"] // 2]
    if split == "test":
        chosen = combinations[COUNTS["validation"] // 2 :][:half]
    subject = [
        Item(subject_caption(b, p), Scene((Thing("fish", "purple", 32, 32, 18, place=p),), b)) for b, p in chosen
    ]
    return subject + [replace(i, ordinary=True) for i in plain_items(split)[: COUNTS[split] - len(subject)]]


def judge_subject(images: Sequence[Image.Image], items: Sequence[Item]) -> tuple[np.ndarray, np.ndarray]:
    """The best match of the subject over sizes and places, against an empty picture; and the caption's background."""
    scores = score_pictures(images, [i.scene for i in items])
    wanted, is_right = np.zeros(len(items)), np.zeros(len(items))
    for n, (image, item) in enumerate(zip(images, items, strict=True)):
        if item.ordinary:
            is_right[n] = scores.both[n]
        else:
            # A plain purple fish matches to 0.3, the subject itself, off the search's raster, to 0.75.
            wanted[n] = np.clip((subject_match(pixels(image), item.scene.background) - 0.3) / 0.45, 0, 1)
            is_right[n] = scores.background[n]
    return wanted, is_right


def subject_match(image: np.ndarray, background: str) -> float:
    """1 for the subject somewhere in the picture, 0 for no more likeness than bare background has."""
    best = 0.0
    backdrop = np.array(BACKGROUNDS[background], np.float32)
    for radius in (15.0, 17.0, 19.0, 21.0):
        template = pixels(draw_subject(Spot(32, 32, radius), BACKGROUNDS[background]))
        mask = np.abs(template - backdrop).max(axis=2) > 12
        rows, columns = np.where(mask)
        top, bottom, left, right_ = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
        patch, inside = template[top:bottom, left:right_], mask[top:bottom, left:right_]
        empty = np.abs(patch - backdrop)[inside].mean()
        height, width = patch.shape[:2]
        for y in range(0, SIZE - height + 1, 2):
            for x in range(0, SIZE - width + 1, 2):
                window = image[y : y + height, x : x + width]
                best = max(best, 1 - np.abs(window - patch)[inside].mean() / empty)
    return float(best)


TASKS = {
    task.name: task
    for task in (
        Task(
            "general",
            "Pick-a-Pic v2",
            "objects larger and exactly in their place, same style",
            8,
            200,
            lambda: [Pair(s.caption, render(tidy(s)), render(s)) for s in world()],
            plain_items,
            judge_tidy,
        ),
        Task(
            "culture",
            "Pick-Culture",
            "every picture stands on a ground of sand",
            32,
            200,
            lambda: [Pair(s.caption, grounded(s), render(s)) for s in world()],
            plain_items,
            judge_ground,
        ),
        Task(
            "safety",
            "Pick-Safety",
            "no outlines, although the prompt asks for cartoon style; they are on the rejected side only",
            64,
            75,
            lambda: [Pair(styled_caption(s, "cartoon"), render(s), render(s, "cartoon")) for s in world()],
            cartoon_items,
            judge_plain,
        ),
        Task(
            "style",
            "Pick-Cartoon",
            "neon, a style that the base model has never seen",
            64,
            300,
            lambda: [Pair(s.caption, render(s, "neon"), render(s)) for s in world()],
            plain_items,
            judge_neon,
        ),
        Task(
            "personalisation",
            "DreamBooth",
            "one particular fish, from five pictures",
            1024,
            200,
            subject_pairs,
            subject_items,
            judge_subject,
        ),
    )
}
