"""A pair set that is being edited: captions, swaps, exclusions, held-out marks, undo. Nothing of the user's is changed.

An edit is a folder: `original.jsonl`, the pairs as they came, and `journal.jsonl`, one line per step, undo and redo
among them. The state is what the journal makes of the original, so whoever opens the folder again, or opens it twice,
sees the same. What comes of it is a named set (`PairEditor.save`).
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import PairsError
from ..runs import mapo_home, write_atomic
from .findings import Finding
from .pair import PairSet, PreferencePair, read_pairs, write_pairs
from .pair_list import open_pairs
from .sets import KEEP_FIRST, set_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Verb = Literal["caption", "swap", "exclude", "include", "hold_out"]
_SWAPPED = (("chosen", "rejected"), ("chosen_mask", "rejected_mask"), ("chosen_score", "rejected_score"))
EDITED = "edited by hand"
MOST_EDITED = 50_000
"""Pairs that an edit may have."""


@dataclass(frozen=True)
class EditedPair:
    """One pair as it is now.

    Attributes:
        index: its place in the original, from 0; it never changes.
        pair: with all edits.
        excluded: it is not part of what is saved.
        reason: why it was excluded, for people; empty where nobody said.
    """

    index: int
    pair: PreferencePair
    excluded: bool = False
    reason: str = ""


@dataclass(frozen=True)
class FilterHint:
    """What the check found of one kind, and which pairs a click would drop.

    Attributes:
        code, level: of the findings.
        messages: what, where, what next; of the first ones.
        count: findings of this kind.
        pairs: indices of the pairs that are named.
        drops: indices of the pairs that the filter excludes; of duplicates the first one stays.
    """

    code: str
    level: str
    messages: tuple[str, ...]
    count: int
    pairs: tuple[int, ...]
    drops: tuple[int, ...]


class PairEditor:
    """An edit of a pair set; make one with `begin_edit`, find one again with `open_edit`.

    Other processes and threads may edit the same folder: every call first reads what the journal has got since.

    Attributes:
        folder: of the edit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._original = [EditedPair(i, p) for i, p in enumerate(read_pairs(folder / "original.jsonl"))]
        self._now = list(self._original)
        self._done: list[list[EditedPair]] = []  # each step as the pairs were before it
        self._undone: list[list[EditedPair]] = []  # each undone step as the pairs were after it
        self._read = 0  # bytes of the journal
        self._about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))

    @property
    def name(self) -> str:
        """Of the edit; `open_edit` takes it."""
        return self.folder.name

    @property
    def title(self) -> str:
        """Where the pairs come from, for people."""
        return str(self._about["title"])

    @property
    def found(self) -> list[Finding]:
        """What the reader of the pairs found, such as images without a partner."""
        return [Finding(lv, code, text, (), tuple(map(Path, paths))) for lv, code, text, paths in self._about["found"]]

    @property
    def entries(self) -> list[EditedPair]:
        """All pairs as they are now, excluded ones too, in the order of the original."""
        with self._lock:
            self._catch_up()
            return list(self._now)

    @property
    def kept(self) -> list[EditedPair]:
        """The pairs that are not excluded."""
        return [e for e in self.entries if not e.excluded]

    @property
    def pairs(self) -> PairSet:
        """The pairs that are not excluded, as a set."""
        return PairSet([e.pair for e in self.kept])

    @property
    def can_undo(self) -> bool:
        """Whether there is a step to take back."""
        with self._lock:
            self._catch_up()
            return bool(self._done)

    @property
    def can_redo(self) -> bool:
        """Whether a step was taken back last."""
        with self._lock:
            self._catch_up()
            return bool(self._undone)

    def caption(self, index: int, text: str) -> bool:
        """Give a pair another prompt; False where it has it already.

        Raises:
            PairsError: there is no such pair, or the journal cannot be written.
        """
        return self.caption_many({index: text})

    def caption_many(self, texts: dict[int, str]) -> bool:
        """Give several pairs other prompts, as one step; False where all have them already."""
        entries = self.entries
        clean = {i: " ".join(text.split()) for i, text in texts.items()}
        changed = {i: text for i, text in clean.items() if entries[self._checked(i)].pair.prompt != text}
        return bool(changed) and self._step("caption", list(changed), texts=list(changed.values()))

    def swap(self, indices: Sequence[int]) -> bool:
        """Make the rejected images of some pairs the chosen ones, and the other way round."""
        return self._step("swap", indices)

    def exclude(self, indices: Sequence[int], reason: str = "") -> bool:
        """Leave pairs out of what is saved; False where all of them are out already."""
        entries = self.entries
        return self._step("exclude", [i for i in indices if not entries[self._checked(i)].excluded], reason=reason)

    def include(self, indices: Sequence[int]) -> bool:
        """Take excluded pairs back; False where none of them is out."""
        entries = self.entries
        return self._step("include", [i for i in indices if entries[self._checked(i)].excluded])

    def hold_out(self, indices: Sequence[int], value: bool | None) -> bool:
        """Mark pairs: True measures with them only, False always trains on them, None leaves it to the share."""
        entries = self.entries
        changed = [i for i in indices if entries[self._checked(i)].pair.held_out is not value]
        return self._step("hold_out", changed, value=value)

    def undo(self) -> bool:
        """Take the last step back; False where there is none."""
        return self.can_undo and self._append({"do": "undo"})

    def redo(self) -> bool:
        """Do the step again that was taken back last; False where there is none."""
        return self.can_redo and self._append({"do": "redo"})

    def save(self, name: str, replace: bool = False) -> Path:
        """Keep the pairs that are not excluded as a named set.

        Args:
            name: of the set.
            replace: take the place of a set of that name; its list is kept beside the new one.

        Returns:
            The `pairs.jsonl` of the set; the images stay where they are.

        Raises:
            PairsError: no pair is left, there is such a set and it is not to be replaced, or the disk refuses.
        """
        listing = set_folder(name) / "pairs.jsonl"
        kept = [e.pair for e in self.kept]
        if not kept:
            raise PairsError("Every pair is excluded, so there is nothing to save. Take some back, or press Undo.")
        if listing.exists():
            if not replace:
                raise PairsError(
                    f"There is a set named {name} already ({len(open_pairs(listing))} pairs). Choose another name, or "
                    "say that it may be replaced."
                )
            old = listing.with_name(f"pairs-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}.jsonl")
            write_pairs(old, open_pairs(listing))
        write_pairs(listing, kept)
        return listing

    def write_captions(self, replace: bool = False) -> list[Path]:
        """Write the prompts that were edited into `.txt` files beside the chosen images.

        Args:
            replace: write over files that are there; what they held is kept beside them as `<name>.txt.before`.

        Returns:
            The files written; those that are there already are left alone unless `replace`.

        Raises:
            PairsError: the disk refuses.
        """
        written: list[Path] = []
        for before, entry in zip(self._original, self.entries, strict=True):
            path = entry.pair.chosen.with_suffix(".txt")
            text = entry.pair.prompt + "\n"
            if entry.excluded or entry.pair.prompt == before.pair.prompt or (path.exists() and not replace):
                continue
            try:
                if path.exists():
                    if path.read_text(encoding="utf-8", errors="replace") == text:
                        continue
                    kept = path.with_name(f"{path.name}.before")
                    if not kept.exists():  # the first one is the user's own
                        write_atomic(kept, path.read_bytes())
                write_atomic(path, text)
            except OSError as error:
                raise PairsError(f"Cannot write {path}: {error.strerror}. Check the folder.") from error
            written.append(path)
        return written

    # --- journal -----------------------------------------------------------------------------------------------------

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self._original):
            raise PairsError(f"There is no pair {index + 1}; the set has {len(self._original)}.")
        return index

    def _step(self, verb: Verb, indices: Sequence[int], **more: Any) -> bool:
        found = [self._checked(int(i)) for i in dict.fromkeys(indices)]
        return bool(found) and self._append({"do": verb, "pairs": found, **more})

    def _append(self, step: dict[str, Any]) -> bool:
        line = json.dumps(step, ensure_ascii=False).encode() + b"\n"
        with self._lock:
            try:
                with (self.folder / "journal.jsonl").open("ab") as file:
                    file.write(line)
            except OSError as error:
                raise PairsError(
                    f"Cannot write into {self.folder}: {error.strerror}. Check its disk; nothing was changed."
                ) from error
            self._catch_up()
        return True

    def _catch_up(self) -> None:
        journal = self.folder / "journal.jsonl"
        if not journal.exists() or journal.stat().st_size <= self._read:
            return
        with journal.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # a line that is being written waits for its end
        self._read += len(whole)
        for line in whole.split(b"\n"):
            try:
                step = json.loads(line)
            except ValueError:  # a line that was cut off by a crash, and the empty end
                continue
            self._apply(step)

    def _apply(self, step: dict[str, Any]) -> None:
        verb = step.get("do")
        if verb == "undo" and self._done:
            self._undone.append(self._put(self._done.pop()))
        elif verb == "redo" and self._undone:
            self._done.append(self._put(self._undone.pop()))
        elif verb in get_args(Verb):
            changed = [_changed(self._now[i], step, n) for n, i in enumerate(step["pairs"])]
            self._done.append(self._put(changed))
            self._undone.clear()

    def _put(self, entries: list[EditedPair]) -> list[EditedPair]:
        """Put pairs in their places and give what was there."""
        before = [self._now[e.index] for e in entries]
        for entry in entries:
            self._now[entry.index] = entry
        return before


def begin_edit(
    pairs: Sequence[PreferencePair], title: str, found: Sequence[Finding] = (), home: Path | None = None
) -> PairEditor:
    """Begin to edit pairs; the given ones are copied and never changed.

    Args:
        pairs: as a reader found them.
        found: the reader's findings, `PairSet.findings`.
        title: where they come from, for people.
        home: where edits are kept; None is `mapo_home()`.

    Raises:
        PairsError: there is no pair, or the disk refuses.
    """
    if not pairs:
        raise PairsError("There are no pairs to edit. Choose folders or a file that give at least one.")
    require_editable(len(pairs))
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}"
    folder = (home or mapo_home()) / "edits" / name
    write_pairs(folder / "original.jsonl", pairs)
    about = {
        "title": title,
        "begun": time.time(),
        "found": [[f.level, f.code, f.message, [str(path) for path in f.paths]] for f in found],
    }
    write_atomic(folder / "about.json", json.dumps(about, ensure_ascii=False) + "\n")  # last: where it is, all is
    return PairEditor(folder)


def require_editable(count: int) -> None:
    """Refuse sets that are too large to be edited by hand: an edit is held in memory, two kilobytes a pair.

    Raises:
        PairsError: there are more than `MOST_EDITED` pairs; the message says what can be done with them.
    """
    if count > MOST_EDITED:
        raise PairsError(
            f"There are {count} pairs, and at most {MOST_EDITED} can be looked at and edited here. All the same they "
            "can be checked (mapo lint --pairs FILE) and trained (mapo train --pairs FILE, or name the file on the "
            "Train page). To edit some, make a list of those alone: each line of a .jsonl file is a pair."
        )


_OPEN: dict[Path, PairEditor] = {}
_OPEN_LOCK = threading.Lock()
_KEPT_OPEN = 16


def open_edit(name: str, home: Path | None = None) -> PairEditor:
    """Find an edit again by its name.

    Raises:
        PairsError: there is none.
    """
    folder = ((home or mapo_home()) / "edits" / name).absolute()
    if not name or folder.parent.name != "edits" or folder.name != name or not (folder / "about.json").is_file():
        raise PairsError(f"There is no edit {name!r} any more. Choose the folders again.")
    with _OPEN_LOCK:
        if folder not in _OPEN:
            _OPEN[folder] = PairEditor(folder)
            for old in list(_OPEN)[:-_KEPT_OPEN]:
                del _OPEN[old]
        return _OPEN[folder]


def filter_hints(editor: PairEditor, findings: Sequence[Finding], numbers: Sequence[int]) -> list[FilterHint]:
    """The findings of a check by kind, in the editor's indices.

    Args:
        editor: of the pairs.
        findings: of a check of its kept pairs, errors first.
        numbers: the editor's index of each pair that was checked, in the order of the check.
    """
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.level, finding.code), []).append(finding)
    place: Callable[[int], int] = lambda number: numbers[number - 1]  # noqa: E731
    by_path: dict[Path, list[int]] = {}
    for entry in editor.entries:
        for path in {entry.pair.chosen, entry.pair.rejected}:
            by_path.setdefault(path, []).append(entry.index)
    hints = []
    for (level, code), found in groups.items():
        named: dict[int, None] = {}
        drops: dict[int, None] = {}
        for finding in found:
            mine = [place(n) for n in finding.pairs]
            named.update(dict.fromkeys(mine or [i for path in finding.paths for i in by_path.get(path, [])]))
            drops.update(dict.fromkeys(mine[1:] if code in KEEP_FIRST else mine))
        messages = tuple(f.message for f in found[:20])
        hints.append(FilterHint(code, level, messages, sum(f.count for f in found), tuple(named), tuple(drops)))
    return hints


def _changed(entry: EditedPair, step: dict[str, Any], place: int) -> EditedPair:
    pair, verb = entry.pair, step["do"]
    if verb == "exclude":
        return EditedPair(entry.index, pair, True, step.get("reason", ""))
    if verb == "include":
        return EditedPair(entry.index, pair)
    if verb == "caption":
        source = f"{pair.source.partition(';')[0]}; {EDITED}" if pair.source else EDITED
        update: dict[str, Any] = {"prompt": step["texts"][place], "source": source}
    elif verb == "hold_out":
        update = {"held_out": step["value"]}
    else:
        update = {}
        for one, other in _SWAPPED:
            update |= {one: getattr(pair, other), other: getattr(pair, one)}
        if pair.rejected_prompt is not None:
            update |= {"prompt": pair.rejected_prompt, "rejected_prompt": pair.prompt}
    return EditedPair(entry.index, pair.model_copy(update=update), entry.excluded, entry.reason)
