from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mapo_core.demo.scenes import random_scene, render
from mapo_core.pairs import PreferencePair

Draw = Callable[..., Image.Image]
MakePairs = Callable[..., list[PreferencePair]]


def scene(number: int, style: str = "plain", size: int = 64) -> Image.Image:
    return render(random_scene(random.Random(number)), style, size)


@pytest.fixture
def draw() -> Draw:
    """draw(number, style, size): a picture; different numbers are different pictures."""
    return scene


@pytest.fixture
def make_pairs(tmp_path: Path) -> MakePairs:
    """make_pairs(count, chosen, rejected): pairs without anything to find; the two functions change them."""

    def same(image: Image.Image, number: int) -> Image.Image:
        return image

    def build(
        count: int,
        chosen: Callable[[Image.Image, int], Image.Image] = same,
        rejected: Callable[[Image.Image, int], Image.Image] = same,
        size: int = 64,
    ) -> list[PreferencePair]:
        pairs = []
        for i in range(count):
            paths = [tmp_path / role / f"{i:03}.png" for role in ("chosen", "rejected")]
            for k, (path, change) in enumerate(zip(paths, (chosen, rejected), strict=True)):
                path.parent.mkdir(exist_ok=True)
                change(scene(10_000 + 2 * i + k, size=size), i).save(path)
            pairs.append(PreferencePair(prompt=f"picture {i}", chosen=paths[0], rejected=paths[1], source="stem"))
        return pairs

    return build
