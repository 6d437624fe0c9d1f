"""Joined, split and filtered sets that are too large for a list, and what else need not be held in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mapo_core.errors import PairsError
from mapo_core.pairs import (
    Finding,
    PairSet,
    PreferencePair,
    begin_edit,
    editing,
    filter_set,
    join_sets,
    load_pairs,
    open_pairs,
    pair_list,
    split_set,
    views,
    write_pairs,
)
from mapo_core.pairs.views import PairView, pairs_at, sample_places
from mapo_core.runs import request_key


def some(folder: Path, *numbers: int, prompt: str = "p") -> list[PreferencePair]:
    return [
        PreferencePair(prompt=prompt, chosen=folder / f"c{n // 2}.png", rejected=folder / f"r{n}.png") for n in numbers
    ]


def both_ways(monkeypatch: pytest.MonkeyPatch, do: Any) -> tuple[Any, Any]:
    """What comes of small sets, and of the same ones where everything counts as large."""
    few = do()
    monkeypatch.setattr(views, "KEPT", 1)
    monkeypatch.setattr(pair_list, "KEPT", 1)
    return few, do()


def test_large_sets_are_joined_split_and_filtered_as_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "a.jsonl", some(tmp_path, *range(12)))
    write_pairs(tmp_path / "b.jsonl", [*some(tmp_path, 3, 20, 21), *some(tmp_path, 3, prompt="q")])

    def do() -> list[Any]:
        sets = [PairSet(load_pairs(tmp_path / name), counts={"stem": 1}) for name in ("a.jsonl", "b.jsonl")]
        joined = join_sets(sets)
        findings = [Finding("warning", "repeated-pair", "", (1, 3, 15)), Finding("warning", "low-resolution", "", (2,))]
        parts = [joined, *split_set(joined, 0.3, 5), *filter_set(joined, findings, {"repeated-pair", "low-resolution"})]
        return [*parts, joined.pairs[12], joined.pairs[2:5], joined.pairs[-1]]

    few, many = both_ways(monkeypatch, do)
    assert [type(part.pairs) for part in few[:5]] == [list] * 5
    assert [type(part.pairs) for part in many[:5]] == [PairView] * 5
    assert [list(part.pairs) for part in few[:5]] == [list(part.pairs) for part in many[:5]]
    assert few[5:] == many[5:]
    sizes = [len(part.pairs) for part in many[:5]]
    assert (sizes[0], sizes[1] + sizes[2], sizes[3:]) == (15, 15, [12, 3])
    with pytest.raises(IndexError):
        many[0].pairs[15]


def test_of_a_large_set_some_places_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = some(tmp_path, *range(12))
    assert [i for i, _ in pairs_at(pairs, sample_places(12, "x"))] == list(range(12))
    monkeypatch.setattr(views, "KEPT", 5)
    drawn = list(pairs_at(pairs, sample_places(12, "x")))
    assert drawn == list(pairs_at(pairs, sample_places(12, "x")))
    assert len(drawn) == 5
    assert all(pairs[i] == pair for i, pair in drawn)
    assert [i for i, _ in drawn] != [i for i, _ in pairs_at(pairs, sample_places(12, "y"))]


def test_a_set_too_large_to_edit_says_what_can_be_done_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "MOST_EDITED", 3)
    assert len(begin_edit(some(tmp_path, 1, 2, 3), "three", home=tmp_path).entries) == 3
    with pytest.raises(PairsError, match=r"There are 4 pairs, and at most 3 .*mapo lint --pairs FILE.*mapo train"):
        begin_edit(some(tmp_path, 1, 2, 3, 4), "four", home=tmp_path)
    assert len(list((tmp_path / "edits").iterdir())) == 1


def test_a_request_is_known_again_whether_its_pairs_are_a_text_or_lines(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.jsonl", some(tmp_path, *range(4)))
    text = (tmp_path / "a.jsonl").read_text()
    files = [tmp_path / "b", tmp_path / "a"]
    key = request_key("{}", text, files)
    assert request_key("{}", iter(text.splitlines(keepends=True)), iter(files[::-1])) == key
    assert request_key("{}", text + "\n", files) != key
    assert len(open_pairs(tmp_path / "a.jsonl")) == 4
