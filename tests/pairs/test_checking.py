"""The check of a set that is being edited, in its process, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mapo_core.pairs import (
    PairEditor,
    PreferencePair,
    begin_edit,
    check_edit,
    lacks_caption,
    last_check,
    pairs_from_folders,
)
from mapo_core.runs import JobStoppedError

MakePairs = Callable[..., list[PreferencePair]]


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))


def test_the_check_of_an_edit_names_its_pairs_and_is_kept(make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs = make_pairs(4)
    (tmp_path / "chosen" / "extra.png").write_bytes(pairs[0].chosen.read_bytes())
    found = pairs_from_folders(tmp_path / "chosen", tmp_path / "rejected", prompt="x")
    pairs = [*found.pairs, found.pairs[1]]
    editor = begin_edit(pairs, "two folders", found.findings)
    assert last_check(editor) is None
    editor.exclude([0])
    seen: list[str] = []
    hints = check_edit(editor, 64, progress=lambda what, done, total: seen.append(what))
    assert set(seen) == {"looking at the images"}
    by_code = {h.code: h for h in hints}
    assert by_code["repeated-pair"].pairs == (1, 4)
    assert by_code["repeated-pair"].drops == (4,)
    assert "extra.png" in by_code["missing-partner"].messages[0]  # what the reader found is part of it
    again = PairEditor(editor.folder)
    assert last_check(again) == hints
    again.exclude(by_code["repeated-pair"].drops)
    left = last_check(again)
    assert left is not None
    assert {h.code: h.drops for h in left}["repeated-pair"] == ()
    again.undo()
    assert last_check(again) == hints


def test_a_cancelled_check_leaves_the_last_one(make_pairs: MakePairs) -> None:
    editor = begin_edit(make_pairs(3), "x")
    with pytest.raises(JobStoppedError):
        check_edit(editor, 64, should_stop=lambda: True)
    assert last_check(editor) is None


def test_images_without_a_prompt_can_be_kept_to_be_captioned(make_pairs: MakePairs, tmp_path: Path) -> None:
    make_pairs(3)  # files named by number alone
    folders = tmp_path / "chosen", tmp_path / "rejected"
    (folders[0] / "001.txt").write_text("a caption", encoding="utf-8")
    found = pairs_from_folders(*folders, trigger="mystyle", keep_unprompted=True)
    assert [(p.prompt, lacks_caption(p)) for p in found.pairs] == [
        ("mystyle", True),
        ("mystyle, a caption", False),
        ("mystyle", True),
    ]
    assert [p.prompt for p in pairs_from_folders(*folders, keep_unprompted=True).pairs] == ["", "a caption", ""]
    assert len(pairs_from_folders(*folders).pairs) == 1  # without it they are left out, and that is said
