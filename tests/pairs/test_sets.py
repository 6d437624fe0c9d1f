"""Named sets, and joining, splitting and filtering; and rejected images that somebody else's sampler draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mapo_core import PairsError
from mapo_core.pairs import (
    Finding,
    GenerationSettings,
    PairSet,
    PreferencePair,
    add_to_set,
    draw_rejected,
    filter_set,
    join_sets,
    prompts_from_folder,
    read_pairs,
    set_folder,
    split_set,
)


def pair(chosen: str, rejected: str = "r.png", prompt: str = "p") -> PreferencePair:
    return PreferencePair(prompt=prompt, chosen=Path(chosen), rejected=Path(rejected), source="test")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))


def test_a_set_is_kept_and_grows(draw: Callable[..., Image.Image]) -> None:
    found, added = add_to_set("mine", [draw(1)], [draw(2)], ["a star"])
    assert added == 1
    found, added = add_to_set("mine", [draw(1), draw(3)], [draw(2), draw(2)], ["a star"])
    assert (added, len(found.pairs)) == (1, 2)
    assert read_pairs(set_folder("mine") / "pairs.jsonl") == found.pairs
    assert len(list((set_folder("mine") / "rejected").iterdir())) == 1, "the same picture is kept once"
    assert add_to_set("other", [draw(1)], [draw(2)], ["a star"])[1] == 1
    with Image.open(found.pairs[0].chosen) as kept:
        assert kept.tobytes() == draw(1).convert("RGB").tobytes()


def test_joined_sets_count_and_keep_order() -> None:
    one = PairSet([pair("a"), pair("b")], counts={"stem": 2})
    two = PairSet([pair("b"), pair("c"), pair("b", prompt="q")], counts={"stem": 1, "order": 2})
    joined = join_sets([one, two])
    assert [p.chosen.name for p in joined.pairs] == ["a", "b", "c", "b"]
    assert joined.counts == {"stem": 3, "order": 2}


def test_pairs_of_one_chosen_image_stay_together() -> None:
    many = PairSet([pair(f"{n // 2}", f"r{n}") for n in range(20)])
    for seed in range(5):
        rest, held = split_set(many, 0.3, seed)
        assert (len(rest.pairs), len(held.pairs)) == (14, 6)
        assert not {p.chosen for p in rest.pairs} & {p.chosen for p in held.pairs}
    assert split_set(many, 0.3, 1) == split_set(many, 0.3, 1)
    assert [len(part.pairs) for part in split_set(many, 0.0)] == [18, 2]
    assert [len(part.pairs) for part in split_set(many, 1.0)] == [2, 18]
    with pytest.raises(PairsError, match="one chosen image cannot be split"):
        split_set(PairSet([pair("a", "r1"), pair("a", "r2")]), 0.5)


def test_of_duplicates_the_first_is_kept() -> None:
    pairs = PairSet([pair(name) for name in "abcd"])
    findings = [
        Finding("warning", "repeated-pair", "", pairs=(1, 3)),
        Finding("warning", "low-resolution", "", pairs=(2,)),
    ]
    kept, dropped = filter_set(pairs, findings, {"repeated-pair"})
    assert [p.chosen.name for p in kept.pairs] == ["a", "b", "d"]
    assert [p.chosen.name for p in dropped.pairs] == ["c"]
    kept, _ = filter_set(pairs, findings, {"repeated-pair", "low-resolution"})
    assert [p.chosen.name for p in kept.pairs] == ["a", "d"]
    assert filter_set(pairs, findings, set())[0].pairs == pairs.pairs


class Sampler:
    """Notes what it is asked for, and can fail."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, tuple[int, int]]] = []
        self.fail_at = 0

    def __call__(self, prompt: str, seed: int, size: tuple[int, int]) -> Image.Image:
        if self.fail_at and len(self.asked) + 1 == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append((prompt, seed, size))
        return Image.new("RGB", size, (seed % 256, 0, 0))


@pytest.fixture
def chosen(tmp_path: Path, draw: Callable[..., Image.Image]) -> Path:
    folder = tmp_path / "style"
    folder.mkdir()
    for n, size in enumerate((64, 64, 96)):
        draw(n).resize((size, 64)).save(folder / f"{n + 3}.png")
        (folder / f"{n + 3}.txt").write_text(f"scene {n}", encoding="utf-8")
    return folder


def drawn(chosen: Path, sampler: Sampler, **settings: int) -> list[PreferencePair]:
    return draw_rejected(
        prompts_from_folder(chosen),
        chosen.parent / "rejected",
        sampler,
        GenerationSettings(**settings),
        resolution=64,
        model="m",
    )


def test_what_is_drawn_is_kept_and_gone_on_with(chosen: Path) -> None:
    sampler = Sampler()
    sampler.fail_at = 3
    with pytest.raises(KeyboardInterrupt):
        drawn(chosen, sampler, per_image=2)
    sampler.fail_at = 0
    pairs = drawn(chosen, sampler, per_image=2)
    assert len(sampler.asked) == len(set(sampler.asked)) == 6
    assert [p.prompt for p in pairs] == ["scene 0", "scene 0", "scene 1", "scene 1", "scene 2", "scene 2"]
    assert len({p.rejected for p in pairs}) == 6
    assert all(p.rejected.exists() for p in pairs)
    assert sampler.asked[-1][2][0] > sampler.asked[-1][2][1], "the bucket of a wide image"
    assert drawn(chosen, sampler, per_image=2) == pairs
    assert len(sampler.asked) == 6


@pytest.mark.parametrize("change", [{"num_inference_steps": 7}, {"seed": 1}, {"guidance_scale": 2}])
def test_other_settings_draw_other_images(chosen: Path, change: dict[str, int]) -> None:
    sampler = Sampler()
    first = drawn(chosen, sampler)
    second = drawn(chosen, sampler, **change)
    assert len(sampler.asked) == 6
    assert not {p.rejected for p in first} & {p.rejected for p in second}


def test_a_new_image_leaves_the_others_as_they_are(chosen: Path, draw: Callable[..., Image.Image]) -> None:
    sampler = Sampler()
    first = drawn(chosen, sampler)
    draw(9).save(chosen / "1.png")  # comes before all others
    (chosen / "1.txt").write_text("scene 9", encoding="utf-8")
    second = drawn(chosen, sampler)
    assert len(sampler.asked) == 4
    assert [p.rejected for p in second[1:]] == [p.rejected for p in first]


def test_nothing_to_draw_for() -> None:
    with pytest.raises(PairsError, match="no chosen image"):
        draw_rejected([], Path("x"), Sampler(), GenerationSettings(), resolution=64, model="m")
