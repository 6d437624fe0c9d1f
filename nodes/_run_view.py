"""What the page shows of the runs: plain data for JSON, read from the run folders and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from ..mapo_core import runs

CURVE_POINTS = 600  # more than a chart in a node has pixels
SMALL_CURVE_POINTS = 60
LOG_TAIL_BYTES = 6000

PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_CAN_RESUME = ("created", "stopped", "failed", "interrupted")
_TRAINING = ("running", "paused", "stopping")
_NOT_A_NAME = re.compile(r'[/\\:*?"<>|\x00-\x1f]')

Event = dict[str, Any]
FindCopy = Callable[[Path], str | None]


class RefusedError(Exception):
    """A request that is not answered, with a reason for the person who made it and an HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


# --- finding -----------------------------------------------------------------------------------------------------


def find_run(name: str) -> runs.RunDir:
    """The run with this name; never anything outside the runs folder.

    Raises:
        RefusedError: it is no name, there is no such run, or its folder is a link to somewhere else.
    """
    if not name or name.startswith(".") or _NOT_A_NAME.search(name):
        raise RefusedError(f"{name!r} cannot be the name of a run.")
    folder = runs.mapo_home() / "runs"
    run = runs.RunDir(folder / name)
    if not run.config.is_file():
        raise RefusedError(f"There is no run {name!r}; it may have been deleted. Refresh the list.", 404)
    if run.path.is_symlink() or run.path.resolve().parent != folder.resolve():
        raise RefusedError(
            f"The folder of run {name!r} is a link to another place, which is not opened from here.", 403
        )
    return run


def find_file(run: runs.RunDir, path: str) -> Path:
    """A picture in the run's samples or a file in its export folder.

    Raises:
        RefusedError: it is anything else, it lies outside of the run, or it does not exist.
    """
    parts = PurePosixPath(path).parts
    suffix = Path(path).suffix.lower()
    picture = len(parts) >= 2 and parts[0] == "samples" and suffix in PICTURES
    exported = len(parts) == 2 and parts[0] == "export" and suffix in (".safetensors", *PICTURES)
    if ".." in parts or "\\" in path or not (picture or exported):
        raise RefusedError("Only the pictures and the LoRA files of a run can be opened.", 403)
    found = run.path.joinpath(*parts)
    if not found.is_file():
        raise RefusedError(f"Run {run.name} has no file {path}; it may have been deleted.", 404)
    if not found.resolve().is_relative_to(run.path.resolve()):
        raise RefusedError(
            f"{path} is a link to a place outside of run {run.name}, which is not opened from here.", 403
        )
    return found


# --- showing -----------------------------------------------------------------------------------------------------


class RunList:
    """The summaries of all runs. Those of runs that nobody trains are kept until their events change."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}

    def read(self, find_copy: FindCopy) -> list[dict[str, Any]]:
        """The runs, newest first.

        Args:
            find_copy: the name under which a LoRA file lies in a loras folder too, or None.
        """
        found = [run for run in runs.list_runs() if not run.path.is_symlink()]
        kept, summaries = {}, []
        for run in found:
            stamp = _stamp(run.events)
            known = self._kept.get(run.path)
            entry = known[1] if known and known[0] == stamp else summary(run)
            if not entry["alive"]:
                kept[run.path] = (stamp, entry)
            summaries.append({**entry, "lora_copy": _copy_name(run, entry["lora"], find_copy)})
        self._kept = kept
        return summaries


def summary(run: runs.RunDir) -> dict[str, Any]:
    """A run in a list."""
    return _describe(run, SMALL_CURVE_POINTS)


def detail(run: runs.RunDir, find_copy: FindCopy) -> dict[str, Any]:
    """All that the page shows of a run."""
    shown = _describe(run, CURVE_POINTS)
    events = runs.reader_of(run).events()
    return {
        **shown,
        "lora_copy": _copy_name(run, shown["lora"], find_copy),
        "samples": [_pick(e, "step", "path", "prompts") for e in events if e["type"] == "sample_saved"],
        "checkpoints": [runs.checkpoint_step(path) for path in run.list_checkpoints()],
        "warnings": [_pick(e, "step", "message") for e in events if e["type"] in ("warning", "memory_step_down")],
        "log": log_tail(run.log),
    }


def _describe(run: runs.RunDir, points: int) -> dict[str, Any]:
    reader = runs.reader_of(run)
    status, events = reader.status(), reader.events()
    alive = status.alive and status.state in _TRAINING  # after its last word a process needs a moment to end
    config = _read_config(run)
    ready = _last(events, lambda e: e.get("phase") == "ready")
    phase = reader.phase() or {}
    sample = _last(events, lambda e: e["type"] == "sample_saved")
    lora = _last(events, lambda e: bool(e.get("lora"))).get("lora")
    checkpoint = run.latest_checkpoint()
    history = runs.run_history(run, points)
    measured = [_measure(e) for e in history.evaluated]
    return {
        "name": run.name,
        "state": status.state,
        "alive": alive,
        "step": status.step,
        "steps": status.steps or _dig(config, "training", "steps"),
        "message": status.message,
        "phase": _pick(phase, "phase", "done", "total") if alive and phase.get("phase") else None,
        "seconds_left": status.metrics.get("seconds_left") if alive else None,
        "seconds_per_step": status.metrics.get("seconds_per_step"),
        "pairs_per_step": ready.get("pairs_per_step"),
        "peak_memory_bytes": status.metrics.get("peak_memory_bytes"),
        "device": ready.get("device"),
        "method": _dig(config, "method", "type"),
        "model": _model_name(_dig(config, "model", "path")),
        "created": run.config.stat().st_mtime,
        "accuracy": measured[-1]["accuracy"] if measured and measured[-1]["step"] else None,  # step 0 is the base
        "base_accuracy": measured[-1]["base_accuracy"] if measured else None,
        "lora": lora if lora and (run.path / lora).is_file() else None,
        "sample": sample.get("path"),
        "can_resume": not alive and status.state in _CAN_RESUME,
        "resume_step": runs.checkpoint_step(checkpoint) if checkpoint else 0,
        "curve": [
            {"step": step, **{name: values[i] for name, values in history.curves.items()}}
            for i, step in enumerate(history.steps)
        ],
        "evaluated": measured,
    }


def _measure(event: Event) -> dict[str, Any]:
    """What the LoRA made of the held-out pairs, and what the base model did."""
    return {
        **_pick(event, "step", "accuracy", "margin", "chosen_mse", "rejected_mse"),
        "base_accuracy": _dig(event, "base", "accuracy"),
        "base_margin": _dig(event, "base", "margin"),
    }


def log_tail(path: Path) -> str:
    """The end of a log, in whole lines, without what a progress bar has overwritten."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - LOG_TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = text.replace("\r\n", "\n").split("\n")
    if size > LOG_TAIL_BYTES:
        lines = lines[1:]
    return "\n".join(line.rpartition("\r")[2] for line in lines).strip()


# --- small things ------------------------------------------------------------------------------------------------


def _last(events: list[Event], wanted: Callable[[Event], bool]) -> Event:
    return next((e for e in reversed(events) if wanted(e)), {})


def _pick(event: Event, *names: str) -> dict[str, Any]:
    return {name: event.get(name) for name in names}


def _dig(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _read_config(run: runs.RunDir) -> Any:
    """The settings as they stand; a run of another version, or one that was edited by hand, is shown all the same."""
    try:
        return json.loads(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _model_name(path: Any) -> str:
    """What a person calls the model: no folders, no file ending."""
    name = str(path or "").replace("\\", "/").rstrip("/").rpartition("/")[2]
    return re.sub(r"\.(safetensors|ckpt)$", "", name)


def _copy_name(run: runs.RunDir, lora: str | None, find_copy: FindCopy) -> str | None:
    return find_copy(run.path / lora) if lora else None


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_size, found.st_mtime_ns)
