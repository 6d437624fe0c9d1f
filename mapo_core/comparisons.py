"""Pictures of base model and LoRA that lie in a run's folder, found again: what `compare_run` drew, and validation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import read_events, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .runs import RunDir

INDEX = "pictures.json"


@dataclass(frozen=True)
class Comparison:
    """The same prompts and seeds, drawn several times.

    Attributes:
        title: what was compared, for people.
        prompts: one per column.
        rows: (title, one picture per prompt); the base model's is the first.
        sheet: all of it in one picture.
    """

    title: str
    prompts: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Path, ...]], ...]
    sheet: Path


def run_comparisons(run: RunDir) -> list[Comparison]:
    """All comparisons of a run whose pictures are there, the newest first."""
    drawn = [(index.stat().st_mtime, _read(run, index)) for index in run.samples.glob(f"compare_*/{INDEX}")]
    samples: dict[str, Any] = {e["path"]: e for e in read_events(run.events) if e["type"] == "sample_saved"}
    own = [(e.get("time", 0.0), _sample(run, e)) for e in samples.values()]
    found = [(when, one) for when, one in [*drawn, *own] if one is not None and _is_there(one)]
    return [one for _, one in sorted(found, key=lambda entry: -entry[0])]


def write_index(folder: Path, title: str, prompts: Sequence[str], rows: Sequence[tuple[str, str]], sheet: Path) -> None:
    """Note what lies in a folder of pictures, last, so that where it is, everything is.

    Args:
        folder: with a folder per row, its pictures numbered `00.png` and so on.
        title: of the comparison.
        prompts: one per column.
        rows: (title, name of its folder).
        sheet: the picture of all.
    """
    value = {"title": title, "prompts": list(prompts), "rows": [list(r) for r in rows], "sheet": sheet.name}
    write_atomic(folder / INDEX, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def _read(run: RunDir, index: Path) -> Comparison | None:
    try:
        value = json.loads(index.read_text(encoding="utf-8"))
        rows = tuple((str(t), _numbered(index.parent / Path(f).name, len(value["prompts"]))) for t, f in value["rows"])
        return Comparison(value["title"], tuple(value["prompts"]), rows, run.samples / Path(value["sheet"]).name)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # half written by an older version or by hand: there is nothing to show


def _sample(run: RunDir, event: dict[str, Any]) -> Comparison | None:
    prompts = tuple(event.get("prompts") or ())
    step = event.get("step")
    if not prompts or not step:
        return None
    base = ("base model", _numbered(run.samples / "base", len(prompts)))
    lora = (f"step {step}", _numbered(run.samples / f"step_{step:08d}", len(prompts)))
    return Comparison(f"while training, step {step}", prompts, (base, lora), run.path / event["path"])


def _numbered(folder: Path, count: int) -> tuple[Path, ...]:
    return tuple(folder / f"{i:02d}.png" for i in range(count))


def _is_there(one: Comparison) -> bool:
    return len(one.rows) > 1 and all(path.exists() for _, paths in one.rows for path in paths)
