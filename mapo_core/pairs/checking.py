"""The check of a pair set that is being edited: done in a process of its own, kept with the edit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runs import run_job, write_atomic
from .captions import FILE_NAME_SOURCE, NO_PROMPT_SOURCE
from .editing import FilterHint, filter_hints
from .findings import Finding, sort_findings
from .pair import write_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from .editing import PairEditor
    from .pair import PreferencePair

_CHECK = "check.json"


def check_edit(
    editor: PairEditor,
    resolution: int = 1024,
    *,
    check_all: bool = False,
    progress: Callable[[str, int, int], object] = lambda what, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[FilterHint]:
    """Check the pairs that are not excluded; the answer is kept until the next check (`last_check`).

    Args:
        editor: of the pairs.
        resolution: that they will be trained at, pixels.
        check_all: decode every image of a large set too, as `lint_pairs` takes it.
        progress, should_stop: as of `run_job`.

    Raises:
        JobStoppedError: `should_stop` said so.
        PairsError: every pair is excluded, or the disk refuses.
    """
    kept = editor.kept
    listing = editor.folder / "checked.jsonl"
    write_pairs(listing, [e.pair for e in kept])
    arguments = {"pairs": str(listing), "resolution": resolution, "check_all": check_all}
    found = run_job("lint", arguments, progress=progress, should_stop=should_stop)
    findings = [
        Finding(f["level"], f["code"], f["message"], tuple(f["pairs"]), tuple(Path(p) for p in f["paths"]), f["count"])
        for f in found["findings"]
    ]
    hints = filter_hints(editor, sort_findings([*editor.found, *findings]), [e.index for e in kept])
    value = {"resolution": resolution, "hints": [asdict(hint) for hint in hints]}
    write_atomic(editor.folder / _CHECK, json.dumps(value, ensure_ascii=False) + "\n")
    return hints


def last_check(editor: PairEditor) -> list[FilterHint] | None:
    """The findings of the last check, None without one; pairs excluded since are no longer among those to drop."""
    path = editor.folder / _CHECK
    if not path.exists():
        return None
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    out = {e.index for e in editor.entries if e.excluded}
    return [
        FilterHint(
            code=h["code"],
            level=h["level"],
            messages=tuple(h["messages"]),
            count=h["count"],
            pairs=tuple(h["pairs"]),
            drops=tuple(i for i in h["drops"] if i not in out),
        )
        for h in value["hints"]
    ]


def lacks_caption(pair: PreferencePair) -> bool:
    """Whether nobody wrote this pair's prompt: there is none, or it was made from the file's name."""
    return not pair.prompt.strip() or FILE_NAME_SOURCE in pair.source or NO_PROMPT_SOURCE in pair.source


def caption_edit(
    editor: PairEditor,
    settings: dict[str, Any],
    *,
    beside_images: bool = False,
    progress: Callable[[str, int, int], object] = lambda what, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[int, dict[str, str]]:
    """Caption the pairs that lack one, in a process of its own; what is done when it is stopped is kept.

    Args:
        editor: of the pairs.
        settings: fields of `CaptionSettings`.
        beside_images: also write a `.txt` file beside each chosen image that has none; else the captions go into the
            edit alone.
        progress, should_stop: as of `run_job`.

    Returns:
        How many pairs got a caption, and image -> why it got none.

    Raises:
        MissingWeightsError: the model is not on this machine; the message says what to download.
        JobStoppedError: `should_stop` said so; the captions written so far are in the edit.
    """
    from .captioner import read_captions

    lacking = [e for e in editor.kept if lacks_caption(e.pair)]
    images = list(dict.fromkeys(e.pair.chosen for e in lacking))
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    out = None if beside_images else editor.folder / "captions" / key
    failed: dict[str, str] = {}
    try:
        if images:
            arguments = {"images": [str(p) for p in images], "out": str(out) if out else None, **settings}
            failed = run_job("caption", arguments, progress=progress, should_stop=should_stop)["failed"]
    finally:
        texts = read_captions(images, out)
        editor.caption_many({e.index: texts[e.pair.chosen] for e in lacking if texts.get(e.pair.chosen)})
    return sum(1 for e in lacking if texts.get(e.pair.chosen)), failed
