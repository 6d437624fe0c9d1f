from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

import mapo_core.pairs
from mapo_core.errors import PairsError
from mapo_core.pairs import PreferencePair, pairs_hash, read_pairs, write_pairs


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def test_pairs_survive_writing_and_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [
        PreferencePair(prompt="ein Bär \u2028 im Schnee", chosen=Path("a ü.png"), rejected=Path("b.png")),
        PreferencePair(
            prompt="",
            chosen=tmp_path / "c.png",
            rejected=tmp_path / "d.png",
            weight=0.5,
            rejected_prompt="x",
            base_prompt="y",
            chosen_score=0.25,
            rejected_score=-1.0,
            chosen_mask=Path("m.png"),
            rejected_mask=tmp_path / "n.png",
            source="order; fixed prompt",
        ),
    ]
    path = tmp_path / "sub" / "pairs.jsonl"
    write_pairs(path, pairs)
    read = read_pairs(path)

    assert read[0] == pairs[0].model_copy(update={"chosen": tmp_path / "a ü.png", "rejected": tmp_path / "b.png"})
    assert read[1] == pairs[1].model_copy(update={"chosen_mask": tmp_path / "m.png"})
    assert "Bär" in path.read_text(encoding="utf-8")
    assert [p.name for p in path.parent.iterdir()] == ["pairs.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_pairs(path, [PreferencePair(prompt="old", chosen=Path("a.png"), rejected=Path("b.png"))])
    before = path.read_bytes()

    def broken():
        yield PreferencePair(prompt="new", chosen=Path("a.png"), rejected=Path("b.png"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pairs(path, broken())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

    old = tmp_path / "another name of the old file"
    old.hardlink_to(path)
    write_pairs(path, [PreferencePair(prompt="new", chosen=Path("a.png"), rejected=Path("b.png"))])
    assert old.read_bytes() == before  # the new file was moved into place, the old one is as it was
    assert read_pairs(path)[0].prompt == "new"


def test_paths_are_relative_to_the_manifest(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"prompt": "a", "chosen": "x/1.png", "rejected": str(tmp_path / "2.png")})
    pair = read_pairs(path)[0]
    assert (pair.chosen, pair.rejected) == (tmp_path / "x/1.png", tmp_path / "2.png")


def test_every_wrong_line_is_named(tmp_path: Path) -> None:
    good = {"prompt": "a", "chosen": "1.png", "rejected": "2.png"}
    path = write_lines(
        tmp_path / "p.jsonl",
        good,
        "{not json",
        "",
        {**good, "winner": 1, "weight": 0},
        {"prompt": "a", "chosen": "", "rejected": "2.png"},
        [1],
        {"prompt": "a", "chosen": "1.png"},
        {**good, "chosen_score": float("nan")},
    )
    with pytest.raises(PairsError) as caught:
        read_pairs(path)
    problems = caught.value.problems
    assert [p.split(":")[0] for p in problems] == [f"line {n}" for n in (2, 4, 4, 5, 6, 7, 8)]
    assert "not JSON" in problems[0]
    assert any("unknown field winner; there are prompt, chosen" in p for p in problems)
    assert any("weight" in p and "greater than 0" in p for p in problems)
    assert problems[3] == "line 5: chosen: is empty; it must be the path of an image (got '')"
    assert problems[5] == "line 7: rejected is missing"
    assert str(path) in str(caught.value)
    assert "and 4 more" in str(caught.value)


def test_a_file_that_is_missing_or_not_utf8_is_explained(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match=r"Cannot read .*none\.jsonl"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(PairsError, match="not UTF-8"):
        read_pairs(tmp_path / "latin.jsonl")


def test_a_byte_order_mark_is_no_fault(tmp_path: Path) -> None:
    line = json.dumps({"prompt": "a", "chosen": "1.png", "rejected": "2.png"})
    (tmp_path / "p.jsonl").write_text(line, encoding="utf-8-sig")
    assert read_pairs(tmp_path / "p.jsonl")[0].prompt == "a"


def test_pairs_are_frozen_and_closed() -> None:
    pair = PreferencePair(prompt="a", chosen=Path("1.png"), rejected=Path("2.png"))
    with pytest.raises(ValidationError):
        pair.prompt = "b"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        PreferencePair(prompt="a", chosen=Path("1.png"), rejected=Path("2.png"), loser=1)  # type: ignore[call-arg]


def test_the_hash_is_of_what_is_trained_on(tmp_path: Path) -> None:
    def make(folder: str, chosen: bytes = b"one", mask: bool = False, **fields: object) -> PreferencePair:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "c.png").write_bytes(chosen)
        (tmp_path / folder / "r.png").write_bytes(b"two")
        paths = {"chosen": tmp_path / folder / "c.png", "rejected": tmp_path / folder / "r.png"}
        if mask:
            paths["chosen_mask"] = tmp_path / folder / "r.png"
        return PreferencePair.model_validate({"prompt": "p", **paths, **fields})

    base = pairs_hash([make("a")])
    assert pairs_hash([make("b", source="elsewhere")]) == base  # moved, told otherwise: the same data
    others = [
        pairs_hash([make("c", chosen=b"One")]),
        pairs_hash([make("d", prompt="q")]),
        pairs_hash([make("d", weight=2)]),
        pairs_hash([make("d", rejected_score=0.5)]),
        pairs_hash([make("d", mask=True)]),
        pairs_hash([make("d", rejected_prompt="p")]),
        pairs_hash([make("a"), make("a")]),
        pairs_hash([]),
    ]
    assert len({base, *others}) == len(others) + 1
    first, second = make("e", prompt="1"), make("e", prompt="2")
    assert pairs_hash([first, second]) != pairs_hash([second, first])


def test_the_hash_of_a_missing_image_names_pair_and_path(tmp_path: Path) -> None:
    (tmp_path / "c.png").write_bytes(b"x")
    pair = PreferencePair(prompt="p", chosen=tmp_path / "c.png", rejected=tmp_path / "r.png")
    with pytest.raises(PairsError, match=r"Pair 1: rejected image is missing: .*r\.png. Fix the folder and scan again"):
        pairs_hash([pair])


def test_every_public_name_is_there_and_importing_is_light() -> None:
    for name in mapo_core.pairs.__all__:
        assert getattr(mapo_core.pairs, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = mapo_core.pairs.nonsense
    code = (
        "import sys, mapo_core.pairs, mapo_core.pairs.pair\n"
        "print(sorted({'PIL', 'numpy', 'pyarrow', 'torch'} & set(sys.modules)))\n"
        "for n in mapo_core.pairs.__all__: getattr(mapo_core.pairs, n)\n"
        "print(sorted({'pyarrow', 'torch'} & set(sys.modules)))"
    )
    root = Path(mapo_core.pairs.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
