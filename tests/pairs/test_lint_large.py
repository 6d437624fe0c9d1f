"""The check of a set that is too large to decode every image of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mapo_core.pairs import LintReport, PreferencePair, filter_set, inventory, lint, lint_pairs
from mapo_core.pairs.pair import PairSet

from .conftest import MakePairs

COUNT = 60


@pytest.fixture(autouse=True)
def _small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lint, "FULL_PAIRS", 30)
    monkeypatch.setattr(lint, "SAMPLE_PAIRS", 10)
    monkeypatch.setattr(lint, "TOLD", 3)


def check(pairs: list[PreferencePair], **options: Any) -> LintReport:
    return lint_pairs(pairs, **{"resolution": 64, "bucket_step": 8, **options})


def drawn() -> list[int]:
    """The pairs that are looked at closely, from 0."""
    sample = lint._sample(COUNT)
    assert sample is not None
    return sample.nonzero()[0].tolist()


def test_some_pairs_are_decoded_and_every_file_is_looked_at(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(COUNT)
    others = [i for i in range(COUNT) if i not in drawn()]
    pairs[others[0]].rejected.unlink()
    pairs[others[1]].chosen.write_text("no picture")
    pairs[others[3]].chosen.write_bytes(pairs[others[2]].chosen.read_bytes())
    with Image.open(pairs[others[4]].rejected) as image:
        image.resize((20, 20)).save(pairs[others[4]].rejected)
    pairs[others[5]].rejected.write_bytes(pairs[others[5]].chosen.read_bytes())
    decoded: list[Path] = []
    load = inventory.load_image
    monkeypatch.setattr(inventory, "load_image", lambda path: decoded.append(path) or load(path))
    seen: list[tuple[int, int]] = []
    pairs[others[-1]] = pairs[others[6]]
    report = check(pairs, progress=lambda *at: seen.append(at))
    named = {f.code: [n - 1 for n in f.pairs] for f in report.findings}
    assert named == {
        "missing-image": [others[0]],
        "unreadable-image": [others[1]],
        "exact-duplicate": [others[2], others[3]],
        "low-resolution": [others[4]],
        "identical-pair": [others[5]],
        "repeated-pair": [others[6], others[-1]],
        "sampled": [],
    }
    assert len(set(decoded)) == len(decoded) == report.looked_at * 2 == 20
    assert seen[-1] == (2 * COUNT - 2 + 20, 2 * COUNT - 2 + 20)
    assert "the images of 10 pairs decoded" in report.render()
    assert json.loads(report.to_json())["looked_at"] == 10
    assert "Of 60 pairs 10, drawn at random but always the same, were decoded" in report.findings[-1].message


def test_what_needs_decoding_is_found_in_the_sample_and_by_checking_all(make_pairs: MakePairs) -> None:
    pairs = make_pairs(COUNT)
    inside, outside = drawn()[0], next(i for i in range(COUNT) if i not in drawn())
    for i in (inside, outside):
        content = pairs[i].chosen.read_bytes()
        pairs[i].chosen.write_bytes(content[: len(content) // 2])  # its header is whole
    assert [f.pairs for f in check(pairs).errors] == [(inside + 1,)]
    every = check(pairs, check_all=True)
    assert [f.pairs for f in every.errors] == sorted([(inside + 1,), (outside + 1,)])
    assert (every.looked_at, [f.code for f in every.findings]) == (None, ["unreadable-image"] * 2)


def test_the_same_picture_is_the_same_whatever_the_bytes(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(COUNT)
    one, two = drawn()[:2]
    with Image.open(pairs[one].chosen) as image:
        image.convert("RGB").save(pairs[one].rejected, "BMP")
        image.convert("RGB").save(pairs[two].chosen, "TIFF")
    for in_memory in (100_000, 0):  # signatures in memory, and in a file
        monkeypatch.setattr(inventory, "_IN_MEMORY", in_memory)
        sampled, every = check(pairs), check(pairs, check_all=True)
        assert [(f.code, f.pairs) for f in sampled.findings[:2]] == [
            ("identical-pair", (one + 1,)),
            ("near-duplicate", (one + 1, two + 1)),
        ]
        assert [(f.code, f.pairs) for f in every.findings] == [
            ("identical-pair", (one + 1,)),
            ("exact-duplicate", (one + 1, two + 1)),
        ]


def test_long_files_that_begin_and_end_alike_are_compared_whole(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_ENDS", 64)
    pairs = make_pairs(COUNT)
    first, second, third = [i for i in range(COUNT) if i not in drawn()][:3]
    header = Image.new("RGB", (64, 64), (9, 60, 90))
    for k, i in enumerate((first, second, third)):
        header.putpixel((30, 30), (0, 0, 200 if k == 1 else 100))
        header.save(pairs[i].chosen, "BMP")
    report = check(pairs)
    assert [(f.code, f.pairs) for f in report.findings if f.code != "sampled"] == [
        ("exact-duplicate", (first + 1, third + 1))
    ]


def test_of_very_many_findings_the_first_are_told_and_all_can_be_dropped(make_pairs: MakePairs) -> None:
    pairs = make_pairs(COUNT)
    pairs = [p.model_copy(update={"prompt": ""}) if i % 2 else p for i, p in enumerate(pairs)]
    twice = [*pairs, *pairs[:10:2]]
    report = check(twice)
    empty = [f for f in report.findings if f.code == "no-prompt"]
    assert [f.pairs for f in empty[:3]] == [(2,), (4,), (6,)]
    assert (len(empty), empty[3].count, empty[3].pairs) == (4, 27, tuple(range(8, 61, 2)))
    assert "27 more of this kind are not told one by one; the first is pair 8" in empty[3].message
    assert report.count("warning") == 30 + 5
    assert "WARNING  no-prompt (30)" in report.render()
    kept, dropped = filter_set(PairSet(twice), report.findings, ["no-prompt", "repeated-pair"])
    assert list(kept.pairs) == pairs[::2]
    assert len(dropped.pairs) == 35


def test_every_unreadable_file_of_a_small_set_is_told_in_its_own_words(
    make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = make_pairs(6)
    for pair in pairs:
        pair.chosen.write_text("no picture")
    assert [str(p.chosen) in f.message for p, f in zip(pairs, check(pairs).errors, strict=True)] == [True] * 6
    monkeypatch.setattr(lint, "FULL_PAIRS", 3)
    told = check(pairs).errors
    assert [f.pairs for f in told] == [(1,), (2,), (3,), (4, 5, 6)]
    assert ["Not an image" in f.message for f in told] == [True, True, True, False]


def test_a_check_that_is_cancelled_ends_at_once(make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(COUNT)
    begun: list[Path] = []
    header = inventory._header
    monkeypatch.setattr(inventory, "_header", lambda path: begun.append(path) or header(path))
    monkeypatch.setattr(lint, "_STRIDE", 1)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(pairs, progress=stop)
    assert len(begun) <= 4 * inventory._workers()
