"""What the events of a run say of its course: curves, measures, the best checkpoint; and which can be reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from .disk import write_atomic
from .events import Event
from .reader import reader_of
from .run_dir import RunDir, checkpoint_step, list_runs

_SORTED_FILES = 100_000

CURVES = ("loss", "margin", "chosen_mse", "rejected_mse", "learning_rate", "peak_memory_bytes")


@dataclass(frozen=True)
class History:
    """The course of a run.

    Attributes:
        steps: optimizer steps of the points.
        curves: name of CURVES -> one value per point, None where it is not known; means over the steps of a point.
        evaluated: the measures on held-out pairs, as their events say.
        samples: paths of the sheets of validation pictures inside the run folder, oldest first.
        warnings: messages.
    """

    steps: list[int]
    curves: dict[str, list[float | None]]
    evaluated: list[Event]
    samples: list[str]
    warnings: list[str]


def run_history(run: RunDir, max_points: int = 600) -> History:
    """Read the events of a run; steps that a resume or rollback has undone do not count.

    Args:
        run: the run.
        max_points: longer curves are averaged over neighbouring steps down to at most this many points.
    """
    reader = reader_of(run)
    course = reader.curves(CURVES, max_points)
    return History(
        steps=course.steps,
        curves=course.values,
        evaluated=reader.events("evaluated"),
        samples=list(dict.fromkeys(e["path"] for e in reader.events("sample_saved"))),
        warnings=[e.get("message", "") for e in reader.events("warning", "rolled_back")],
    )


def margin_of(event: Event) -> float | None:
    """The margin of a step: how much larger the rejected image's error is than the chosen one's."""
    chosen, rejected = event.get("chosen_mse"), event.get("rejected_mse")
    return None if chosen is None or rejected is None else rejected - chosen


def best_step(run: RunDir) -> int | None:
    """The step of the checkpoint that is best on held-out pairs: by accuracy, then margin; without measures the last.

    Returns:
        None if there is no checkpoint.
    """
    steps = [checkpoint_step(path) for path in run.list_checkpoints()]
    if not steps:
        return None
    measured = {e["step"]: e for e in reader_of(run).events("evaluated")}
    known = [s for s in steps if s in measured]
    if not known:
        return steps[-1]
    return max(known, key=lambda s: (measured[s].get("accuracy") or 0.0, measured[s].get("margin") or 0.0, s))


def request_key(config_json: str, pairs_jsonl: str | Iterable[str], images: Iterable[Path]) -> str:
    """What was asked for, as one number: settings without the name, pairs, and size and time of every image file.

    The same key means that the same training was asked for, on files that have not changed since.

    Args:
        config_json: content of config.json.
        pairs_jsonl: content of pairs.jsonl, or its lines one after the other.
        images: files in any order; of more than 100 000 the order counts, and they need not fit into memory.
    """
    config = json.loads(config_json)
    config.pop("name", None)
    config.pop("parent", None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for text in [pairs_jsonl] if isinstance(pairs_jsonl, str) else pairs_jsonl:
        digest.update(text.encode())
    waiting = iter(images)
    few = list(islice(waiting, _SORTED_FILES + 1))
    for path in sorted(set(few)) if len(few) <= _SORTED_FILES else chain(few, waiting):
        try:
            stat = path.stat()
            digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        except OSError:
            digest.update(f"{path}\0missing\n".encode())
    return digest.hexdigest()


def remember_request(run: RunDir, key: str) -> None:
    """Note what a run was made for, so that `runs_of_request` finds it."""
    write_atomic(run.path / "request.json", json.dumps({"key": key}) + "\n")


def runs_of_request(key: str, home: Path | None = None) -> list[RunDir]:
    """The runs that were made for this request, newest first."""
    found = []
    for run in list_runs(home):
        try:
            known = json.loads((run.path / "request.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(known, dict) and known.get("key") == key:
            found.append(run)
    return found
