"""What the caches hold on disk: how large it is, whose it is, and how to remove what nobody needs. No torch."""

from __future__ import annotations

import json
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import CacheError
from .runs import is_locked, list_runs, mapo_home, write_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .runs import RunDir

FORMAT = "mapo-cache-1"  # what our shards say of themselves; nothing else is ever removed
KINDS = ("latents", "prompts", "masks")
DAY_S = 86_400.0

_USED = "cache.json"
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class CacheShard:
    """A file of encoded images or prompts, or of masks.

    Attributes:
        path: the file.
        kind: "latents", "prompts" or "masks".
        size: bytes.
        last_used: Unix time at which a run last read or wrote it, seconds.
        model: what it was encoded with, as the run named it; "" in files of the first version, and of masks, which
            suit every model.
        precision: "fp32" or "bf16"; "" likewise.
        runs: names of the runs that need it.
    """

    path: Path
    kind: str
    size: int
    last_used: float
    model: str
    precision: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class PrunePlan:
    """What would be removed, and why the rest stays.

    Attributes:
        shards: to be removed.
        kept: how many stay.
        in_use: how many of these stay because a run that is being trained needs them.
        unknown: names of runs that do not say what they need; resumed, they would encode again.
    """

    shards: tuple[CacheShard, ...]
    kept: int
    in_use: int
    unknown: tuple[str, ...]

    @property
    def size(self) -> int:
        """What would be free again, bytes."""
        return sum(shard.size for shard in self.shards)


def note_use(run: RunDir, used: dict[str, list[str]]) -> None:
    """Write down in a run which shards it needs, by kind."""
    write_atomic(run.path / _USED, json.dumps(used) + "\n")


def list_cache(home: Path | None = None) -> list[CacheShard]:
    """The shards of the caches, those of one model together, the largest model first.

    Args:
        home: where the `cache` folder lies; None is `mapo_home()`.
    """
    users: dict[str, list[str]] = {}
    for run in list_runs(home):
        for name in _needs(run) or ():
            users.setdefault(name, []).append(run.name)
    found: list[CacheShard] = []
    for kind in KINDS:
        for path in sorted((_home(home) / kind).glob("*.safetensors")):
            about = _about(path)
            if about is None:
                continue
            state = path.stat()
            runs = tuple(users.get(path.name, ()))
            model, precision = str(about.get("model", "")), str(about.get("precision", ""))
            found.append(CacheShard(path, kind, state.st_size, state.st_mtime, model, precision, runs))
    totals: dict[str, int] = {}
    for shard in found:
        totals[shard.model] = totals.get(shard.model, 0) + shard.size
    return sorted(found, key=lambda s: (-totals[s.model], s.model, s.kind, -s.last_used))


def plan_prune(*, older_than_days: float | None = None, unused: bool = False, home: Path | None = None) -> PrunePlan:
    """What could be removed; nothing is.

    Args:
        older_than_days: what no run has read or written for so long, days.
        unused: what no run folder needs. With both, what both say.
        home: where the `cache` folder lies; None is `mapo_home()`.

    Raises:
        CacheError: neither is asked for, or a run is just being prepared and cannot say yet what it needs.
    """
    if older_than_days is None and not unused:
        raise CacheError("Say what may go: what no run needs (--unused), or what is older than so many days.")
    busy: set[str] = set()
    blind: set[str] = set()  # kinds of which a run that is being trained does not say what it needs
    unknown: list[str] = []
    for run in list_runs(home):
        needs = _needs(run)
        if is_locked(run):
            if needs is None or _begun_since(run):
                raise CacheError(f"Run {run.name} is being prepared. Wait until it trains, or stop it, and try again.")
            busy |= needs
            blind |= set(KINDS) - _kinds_said(run)
        if needs is None:
            unknown.append(run.name)
    shards = list_cache(home)
    limit = None if older_than_days is None else time.time() - older_than_days * DAY_S
    chosen = [s for s in shards if (not unused or not s.runs) and (limit is None or s.last_used < limit)]
    free = [s for s in chosen if s.path.name not in busy and s.kind not in blind]
    return PrunePlan(tuple(free), len(shards) - len(free), len(chosen) - len(free), tuple(unknown))


def prune_cache(plan: PrunePlan) -> int:
    """Remove what a plan says, but for what has been used since; the bytes that are free again."""
    freed = 0
    for shard in plan.shards:
        with suppress(OSError):  # gone already, or open in another program on Windows
            if shard.path.stat().st_mtime == shard.last_used and _about(shard.path) is not None:
                shard.path.unlink()
                freed += shard.size
    return freed


def describe_cache(shards: Iterable[CacheShard]) -> list[dict[str, Any]]:
    """One row per model, kind and precision: number of files, bytes, last use and the runs that need some of them."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for s in shards:
        key = (s.model, s.kind, s.precision)
        new = {"model": s.model, "kind": s.kind, "precision": s.precision, "files": 0, "size": 0, "last_used": 0.0}
        row = rows.setdefault(key, {**new, "runs": set()})
        row["files"] += 1
        row["size"] += s.size
        row["last_used"] = max(row["last_used"], s.last_used)
        row["runs"] |= set(s.runs)
    return [{**row, "runs": sorted(row["runs"])} for row in rows.values()]


def _home(home: Path | None) -> Path:
    return (mapo_home() if home is None else home) / "cache"


def _needs(run: RunDir) -> set[str] | None:
    """Names of the shards that a run has said it needs."""
    try:
        used = json.loads((run.path / _USED).read_text(encoding="utf-8"))
        return {str(name) for names in used.values() for name in names}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _kinds_said(run: RunDir) -> set[str]:
    """The kinds of shards of which a run has said what it needs; of masks earlier versions did not."""
    try:
        return set(json.loads((run.path / _USED).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return set()


def _begun_since(run: RunDir) -> bool:
    """Whether a process took the run up after it last said what it needs."""
    from .runs import reader_of

    starts = [e["time"] for e in reader_of(run).events("run_started", "run_resumed")]
    return bool(starts) and (run.path / _USED).stat().st_mtime < starts[-1]


def _about(path: Path) -> dict[str, Any] | None:
    """What a shard says of itself, or None if it is not one of ours."""
    try:
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(length, _LARGEST_HEADER)))
        metadata = header["__metadata__"]
        return json.loads(metadata.get("about", "{}")) if metadata["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None
