"""The demo world, its judge, and the model that was trained in it."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import mapo_core.demo
from mapo_core.demo.classifier import load_classifier, score_pictures
from mapo_core.demo.run import draw_captions, fidelity, write_pictures
from mapo_core.demo.scenes import (
    BACKGROUNDS,
    COLOURS,
    NAMED_STYLES,
    OBJECTS,
    STYLES,
    UNSEEN_STYLE,
    evaluation_scenes,
    is_held_out,
    random_scene,
    render,
    scenes,
    styled_caption,
)

MODEL = Path(mapo_core.demo.__file__).parent / "model"


def test_the_world_is_as_large_as_promised() -> None:
    assert len(OBJECTS) >= 10
    assert len(COLOURS) >= 8
    assert len(BACKGROUNDS) >= 5
    assert len(STYLES) >= 4
    assert UNSEEN_STYLE in STYLES
    assert UNSEEN_STYLE not in NAMED_STYLES
    rng = random.Random(0)
    drawn = [random_scene(rng) for _ in range(3000)]
    assert Counter(len(s.things) for s in drawn).keys() == {1, 2}
    assert {s.things[0].size for s in drawn} == {"", "big", "small"}
    assert {s.relation for s in drawn} == {"", "left of", "above"}
    assert all(t.colour != s.background for s in drawn for t in s.things)


def test_captions_say_what_is_drawn() -> None:
    for scene in itertools.islice(scenes(3, held_out=False), 200):
        for thing in scene.things:
            assert f"{thing.colour} {thing.name}" in scene.caption
        assert scene.caption.endswith(f"{scene.background} background")
        assert styled_caption(scene, "plain") == scene.caption
        assert styled_caption(scene, "cartoon").endswith(", cartoon style")


def test_held_out_combinations_are_never_trained_on() -> None:
    trained = {s.combination for s in itertools.islice(scenes(1, held_out=False), 5000)}
    evaluated = evaluation_scenes(200, seed=99)
    assert not trained & {s.combination for s in evaluated}
    assert all(is_held_out(s) for s in evaluated)
    assert len({s.caption for s in evaluated}) == 200
    assert sum(len(s.things) == 2 for s in evaluated) == 60


def test_objects_stay_in_the_picture_and_styles_differ() -> None:
    for scene in evaluation_scenes(40, seed=1):
        for thing in scene.things:
            assert thing.radius <= thing.x <= 64 - thing.radius
            assert thing.radius <= thing.y <= 64 - thing.radius
        pictures = [np.asarray(render(scene, s), dtype=float) for s in STYLES]
        for a, b in itertools.combinations(pictures, 2):
            assert abs(a - b).mean() > 0.5


def test_the_judge_is_right_about_real_renders() -> None:
    held_out = evaluation_scenes(200, seed=123)
    judge = load_classifier()
    for style in STYLES:
        scores = score_pictures([render(s, style) for s in held_out], held_out, judge)
        assert scores.both.mean() >= 0.98
        assert (scores.styles.argmax(1) == STYLES.index(style)).mean() >= 0.98


def test_the_judge_notices_wrong_pictures() -> None:
    held_out = evaluation_scenes(60, seed=5)
    scores = score_pictures([render(s) for s in held_out[1:] + held_out[:1]], held_out)
    assert scores.both.mean() < 0.2


def test_the_shipped_model_is_small() -> None:
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 12e6


def test_the_demo_writes_two_folders_of_pictures_once(tmp_path: Path) -> None:
    chosen, rejected = write_pictures(tmp_path, "neon", count=3)
    assert len(list(chosen.glob("*.png"))) == len(list(rejected.glob("*.png"))) == len(list(chosen.glob("*.txt"))) == 3
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    write_pictures(tmp_path, "neon", count=3)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}


@pytest.mark.slow
def test_the_shipped_model_draws_what_the_caption_says() -> None:
    from mapo_core import FAMILIES, detect
    from mapo_core.config import ModelConfig
    from mapo_core.reopen import TrainedModel

    family = FAMILIES[detect("demo").family]
    model = family.load(ModelConfig(path="demo"))
    captions = evaluation_scenes(200, seed=99)
    trained = TrainedModel(None, model, family, 0, {})  # pyright: ignore[reportArgumentType]
    images = draw_captions(trained, captions, base=True)
    assert score_pictures(images, captions).both.mean() >= 0.9
    assert fidelity(images, captions, "cartoon").style < 0.1
    assert fidelity(images, captions, "neon").style < 0.1


def test_captions_are_read_back() -> None:
    from mapo_core.demo.scenes import scene_of_caption

    for scene in itertools.islice(scenes(17, held_out=False), 200):
        for style in STYLES:
            found = scene_of_caption(styled_caption(scene, style))
            assert found is not None
            assert found.caption == scene.caption
    assert scene_of_caption("a castle at night") is None
    assert scene_of_caption("a red circle") is None
