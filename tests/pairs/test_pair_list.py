"""Pairs that stay in their file are the pairs that a list of them would be."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest

from mapo_core.errors import PairsError
from mapo_core.pairs import (
    PairList,
    PreferencePair,
    manifests,
    open_pairs,
    pairs_from_csv,
    pairs_from_jsonl,
    read_pairs,
    spool_pairs,
    write_pairs,
)


def listing(tmp_path: Path, count: int = 5) -> Path:
    """Lines as people write them: a mark at the front, empty lines, line separators inside a prompt, both ends."""
    path = tmp_path / "pairs.jsonl"
    lines = [
        json.dumps({"prompt": f"größe \u2028 {i}", "chosen": f"c{i}.png", "rejected": "r.png"}, ensure_ascii=False)
        for i in range(count)
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(lines[:2]).encode() + b"\r\n" + "\n".join(lines[2:]).encode())
    return path


def test_it_is_the_list(tmp_path: Path) -> None:
    path = listing(tmp_path)
    lazy, whole = open_pairs(path), read_pairs(path)
    assert [p.prompt for p in whole] == [f"größe \u2028 {i}" for i in range(5)]
    assert whole[4].chosen == tmp_path / "c4.png"
    assert list(lazy) == whole
    assert [lazy[i] for i in range(5)] == whole
    assert (lazy[-1], lazy[1:4], len(lazy)) == (whole[-1], whole[1:4], 5)
    assert lazy == whole
    assert lazy != whole[:4]
    assert lazy != [*whole[:4], whole[0]]
    with pytest.raises(IndexError):
        lazy[5]
    assert [r["chosen"] for r in lazy.records()] == [f"c{i}.png" for i in range(5)]


def test_every_wrong_line_is_told_of_very_many_the_first(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a"}\n' * 3000)
    with pytest.raises(PairsError, match="and 5997 more") as caught:
        open_pairs(path)
    assert len(caught.value.problems) == 1000
    assert caught.value.problems[0].startswith("line 1: chosen is missing")
    with pytest.raises(PairsError, match="Cannot read"):
        open_pairs(tmp_path / "none.jsonl")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = listing(tmp_path)
    lazy = open_pairs(path)
    path.write_bytes(path.read_bytes() + b'\n{"prompt": "new", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(PairsError, match="has changed"):
        lazy[0]
    with pytest.raises(PairsError, match="has changed"):
        list(lazy)


def test_few_pairs_are_a_list_and_many_a_file(tmp_path: Path) -> None:
    pairs = [PreferencePair(prompt=str(i), chosen=Path("/c"), rejected=Path("/r"), source="x") for i in range(30)]
    assert spool_pairs(islice(pairs, 30), tmp_path / "s.jsonl", kept=30) == pairs
    assert not (tmp_path / "s.jsonl").exists()
    spooled = spool_pairs(iter(pairs), tmp_path / "s.jsonl", kept=29)
    assert isinstance(spooled, PairList)
    assert list(spooled) == pairs
    assert [spooled[i] for i in (0, 29, 15)] == [pairs[i] for i in (0, 29, 15)]
    assert [p.name for p in tmp_path.iterdir()] == ["s.jsonl"]


def test_large_manifests_stay_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    path = listing(tmp_path)
    small = pairs_from_jsonl(path).pairs
    assert isinstance(small, list)
    table = tmp_path / "pairs.csv"
    table.write_text("prompt,chosen,rejected\n" + "".join(f"p{i},c.png,r.png\n" for i in range(9)))
    few = pairs_from_csv(table).pairs
    monkeypatch.setattr(manifests, "KEPT", 3)
    monkeypatch.setattr(manifests, "spool_pairs", lambda pairs, path: spool_pairs(pairs, path, kept=3))
    large = pairs_from_jsonl(path).pairs
    assert isinstance(large, PairList)
    assert list(large) == small
    assert small[0].source == "pairs.jsonl; prompt from pairs.jsonl"
    many = pairs_from_csv(table).pairs
    assert isinstance(many, PairList)
    assert list(many) == few
    write_pairs(tmp_path / "copy.jsonl", many)
    assert read_pairs(tmp_path / "copy.jsonl") == few
