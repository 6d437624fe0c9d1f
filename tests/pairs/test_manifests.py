from __future__ import annotations

import json
from pathlib import Path

import pytest

from mapo_core.errors import PairsError
from mapo_core.pairs import pairs_from_csv, pairs_from_jsonl, pairs_from_manifest, read_pair_set

COLUMNS = "prompt,chosen,rejected,weight,chosen_score"


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_text(text, encoding=encoding)
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv(tmp_path: Path, separator: str) -> None:
    rows = [
        COLUMNS.split(","),
        ['"ein Bär, braun; groß"', "c/1.png", "r/1.png", "2", ""],
        ["", "c 2.png", "r 2.png", "", "0.5"],
    ]
    path = write(tmp_path / "pairs.csv", "\r\n".join(separator.join(row) for row in rows), "utf-8-sig")
    first, second = pairs_from_csv(path).pairs
    assert (first.prompt, first.weight, first.chosen_score) == ("ein Bär, braun; groß", 2.0, None)
    assert (first.chosen, first.rejected) == (tmp_path / "c/1.png", tmp_path / "r/1.png")
    assert (second.prompt, second.weight, second.chosen_score) == ("", 1.0, 0.5)
    assert first.source == "pairs.csv; prompt from pairs.csv"


def test_csv_cells_may_hold_line_ends(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'prompt,chosen,rejected\n"two\nlines",1.png,2.png\nx,1.png,\n')
    with pytest.raises(PairsError) as caught:
        pairs_from_csv(path)
    assert caught.value.problems == ["line 4: rejected is missing"]
    path = write(tmp_path / "p.csv", 'prompt,chosen,rejected\n"two\nlines",1.png,2.png\n')
    assert pairs_from_csv(path).pairs[0].prompt == "two\nlines"


def test_every_wrong_row_is_named(tmp_path: Path) -> None:
    text = f"{COLUMNS},winner\nfox,1.png,2.png,,,x\na, fox,1.png,2.png,1,1,\nfox,1.png,2.png,minus,,\n"
    with pytest.raises(PairsError) as caught:
        pairs_from_csv(write(tmp_path / "p.csv", text))
    problems = caught.value.problems
    assert [p.split(":")[0] for p in problems] == ["line 2", "line 3", "line 4"]
    assert "unknown field winner" in problems[0]
    assert "more cells than the 6 columns" in problems[1]
    assert "weight" in problems[2]


def test_broken_quotes_are_named(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match=r"line 2: not CSV \(unexpected end of data\)"):
        pairs_from_csv(write(tmp_path / "p.csv", 'prompt,chosen,rejected\n"open,1.png,2.png\n'))


def test_jsonl_keeps_its_own_source(tmp_path: Path) -> None:
    record = {"prompt": "fox", "chosen": "1.png", "rejected": "2.png"}
    path = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, [record, {**record, "source": "a friend"}])))
    found = pairs_from_jsonl(path)
    assert [p.source for p in found.pairs] == ["p.jsonl; prompt from p.jsonl", "a friend"]
    assert found.counts == {"manifest": 2}


def test_the_kind_is_told_by_the_name(tmp_path: Path) -> None:
    record = {"prompt": "fox", "chosen": "1.png", "rejected": "2.png"}
    write(tmp_path / "a.JSONL", json.dumps(record))
    write(tmp_path / "a.csv", "prompt,chosen,rejected\nfox,1.png,2.png")
    write(tmp_path / "a.tsv", "prompt\tchosen\trejected\nfox, red\t1.png\t2.png")
    assert pairs_from_manifest(tmp_path / "a.JSONL").pairs[0].prompt == "fox"
    assert read_pair_set(tmp_path / "a.csv").pairs[0].prompt == "fox"
    assert read_pair_set(tmp_path / "a.tsv").pairs[0].prompt == "fox, red"
    with pytest.raises(PairsError, match="must end in"):
        pairs_from_manifest(tmp_path / "a.txt")


def test_an_empty_list_is_an_error(tmp_path: Path) -> None:
    for name, text in (("p.jsonl", "\n\n"), ("p.csv", "prompt,chosen,rejected\n"), ("q.csv", "")):
        with pytest.raises(PairsError, match="has no pairs"):
            pairs_from_manifest(write(tmp_path / name, text))
