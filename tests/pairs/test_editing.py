from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mapo_core.errors import PairsError
from mapo_core.pairs import (
    PairEditor,
    PreferencePair,
    begin_edit,
    filter_hints,
    lint_pairs,
    list_sets,
    open_edit,
    read_pairs,
)

MakePairs = Callable[..., list[PreferencePair]]


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pairs: MakePairs) -> PairEditor:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    return begin_edit(make_pairs(4), "two folders")


def prompts(editor: PairEditor) -> list[str]:
    return [e.pair.prompt for e in editor.kept]


def test_every_step_can_be_taken_back_and_done_again(editor: PairEditor) -> None:
    states = [editor.entries]
    steps = [
        lambda: editor.caption(1, "  another\n caption "),
        lambda: editor.swap([0, 1]),
        lambda: editor.exclude([2, 3], "too small"),
        lambda: editor.hold_out([0], True),
        lambda: editor.include([3]),
    ]
    for step in steps:
        assert step()
        states.append(editor.entries)
    assert len({tuple(s) for s in states}) == len(states)
    assert editor.entries[1].pair.prompt == "another caption"
    assert editor.entries[0].pair.chosen.parent.name == "rejected"
    assert [e.index for e in editor.kept] == [0, 1, 3]
    assert editor.entries[2].reason == "too small"
    for state in reversed(states[:-1]):
        assert editor.undo()
        assert editor.entries == state
    assert not editor.undo()
    for state in states[1:]:
        assert editor.redo()
        assert editor.entries == state
    assert not editor.redo()


def test_a_new_step_ends_what_can_be_done_again(editor: PairEditor) -> None:
    editor.caption(0, "a")
    editor.undo()
    editor.caption(0, "b")
    assert not editor.can_redo
    assert editor.entries[0].pair.prompt == "b"


def test_what_changes_nothing_is_no_step(editor: PairEditor) -> None:
    assert not editor.caption(0, "picture 0")
    assert not editor.include([0])
    assert not editor.hold_out([0], None)
    assert not editor.swap([])
    assert not editor.can_undo


def test_an_edit_is_found_again_with_its_undo_and_a_torn_line_is_waited_for(editor: PairEditor) -> None:
    editor.caption(0, "kept")
    editor.exclude([1])
    editor.undo()
    journal = editor.folder / "journal.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"do": "exclude", "pai')  # another process is in the middle of its line
    again = PairEditor(editor.folder)
    assert again.entries == editor.entries
    assert again.can_redo
    with journal.open("ab") as file:
        file.write(b'rs": [3]}\n')
    for one in (again, editor, open_edit(editor.name)):
        assert prompts(one) == ["kept", "picture 1", "picture 2"]


def test_two_at_once_see_each_others_steps(editor: PairEditor) -> None:
    other = PairEditor(editor.folder)
    editor.caption(0, "a")
    other.caption(1, "b")
    assert prompts(editor) == prompts(other) == ["a", "b", "picture 2", "picture 3"]
    editor.undo()
    assert prompts(other) == ["a", "picture 1", "picture 2", "picture 3"]


def test_unknown_edits_and_pairs_are_refused(editor: PairEditor) -> None:
    for name in ("", "..", "../edits", "nowhere", f"../edits/{editor.name}"):
        with pytest.raises(PairsError, match="Choose the folders again"):
            open_edit(name)
    with pytest.raises(PairsError, match="no pair 5"):
        editor.swap([4])
    with pytest.raises(PairsError, match="no pair 0"):
        editor.caption(-1, "x")


def test_a_saved_set_holds_what_is_kept_and_replaces_nothing_unasked(editor: PairEditor) -> None:
    before = {p: p.stat().st_mtime_ns for p in editor.entries[0].pair.chosen.parent.parent.rglob("*.*")}
    editor.exclude([1])
    editor.hold_out([2], True)
    listing = editor.save("mine")
    assert [(p.prompt, p.held_out) for p in read_pairs(listing)] == [
        ("picture 0", None),
        ("picture 2", True),
        ("picture 3", None),
    ]
    editor.include([1])
    with pytest.raises(PairsError, match="named mine already"):
        editor.save("mine")
    assert len(read_pairs(listing)) == 3
    editor.save("mine", replace=True)
    assert len(read_pairs(listing)) == 4
    assert [len(read_pairs(p)) for p in listing.parent.glob("pairs-*.jsonl")] == [3]
    assert list_sets() == {"mine": 4}
    editor.exclude(range(4))
    with pytest.raises(PairsError, match="nothing to save"):
        editor.save("other")
    assert len(read_pairs(editor.folder / "original.jsonl")) == 4
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_captions_are_written_only_when_asked_and_never_lose_the_old_ones(editor: PairEditor) -> None:
    entry = editor.entries[0]
    path = entry.pair.chosen.with_suffix(".txt")
    path.write_text("by hand", encoding="utf-8")
    editor.caption(0, "new words")
    editor.caption(1, "others")
    assert path.read_text(encoding="utf-8") == "by hand"
    assert editor.write_captions() == [editor.entries[1].pair.chosen.with_suffix(".txt")]
    assert path.read_text(encoding="utf-8") == "by hand"
    assert editor.write_captions(replace=True) == [path]
    editor.caption(0, "newer words")
    editor.write_captions(replace=True)
    assert path.read_text(encoding="utf-8") == "newer words\n"
    assert path.with_name("000.txt.before").read_text(encoding="utf-8") == "by hand"


def test_filters_name_the_pairs_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_pairs: MakePairs):
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    pairs = make_pairs(5)
    pairs[3] = pairs[2].model_copy(update={"source": "again"})
    pairs[4] = pairs[4].model_copy(update={"prompt": " "})
    editor = begin_edit(pairs, "x")
    editor.exclude([0])
    kept = editor.kept
    report = lint_pairs([e.pair for e in kept], resolution=64)
    hints = {h.code: h for h in filter_hints(editor, report.findings, [e.index for e in kept])}
    assert hints["repeated-pair"].pairs == (2, 3)
    assert hints["repeated-pair"].drops == (3,)
    assert hints["no-prompt"].drops == (4,)
    editor.exclude(hints["repeated-pair"].drops, "repeated-pair")
    assert [e.index for e in editor.kept] == [1, 2, 4]
