"""Start a run, or take one up again, and show it in its node until it ends."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..mapo_core import TrainingError
from ..mapo_core.runs import EventTail, RunHandle, attach, run_status, start_run
from . import _comfy

if TYPE_CHECKING:
    from pathlib import Path

    from ..mapo_core.runs import Event, RunDir

_SEND_EVERY_S = 0.25
_POLL_S = 0.1
_END_S = 60.0

logger = logging.getLogger(__name__)


def train_in_node(run: RunDir, node_id: str, steps: int) -> None:
    """Train to the end. Cancel asks the trainer to save and stop, a second Cancel ends it at once.

    Raises:
        Exception: ComfyUI's own for an interruption, once the work is saved.
        TrainingError: the run failed; the message says why.
    """
    tail = EventTail(run.events)
    tail.skip()  # the page reads what is already there by itself
    handle = attach(run) or start_run(run, "tied")
    _comfy.ACTIVE[node_id] = run.name
    try:
        stop = _follow(handle, tail, node_id, steps)
    finally:
        _comfy.ACTIVE.pop(node_id, None)
    status = handle.status()
    if stop is not None:
        raise stop
    if status.state not in ("finished", "stopped"):
        raise TrainingError(f"{status.message} The log is {run.log}.")


def _follow(handle: RunHandle, tail: EventTail, node_id: str, steps: int) -> Exception | None:
    """Until the process has ended; returns the interruption, if there was one."""
    bar = _comfy.Progress(node_id, steps)
    cancelled: Exception | None = None
    waiting: list[Event] = []
    sent = 0.0
    _comfy.send("mapo.progress", node=node_id, run=handle.run.name, events=[])
    try:
        while True:
            alive = handle.is_alive()
            if stop := bar.interruption():
                handle.stop()  # the second time this ends it at once
                cancelled = stop
            waiting += tail.poll()
            if waiting and (time.monotonic() - sent >= _SEND_EVERY_S or not alive):
                _show(handle.run, waiting, bar, node_id, steps)
                waiting, sent = [], time.monotonic()
            if not alive:
                return cancelled
            time.sleep(_POLL_S)
    except BaseException:
        handle.request("stop")
        handle.close()
        handle.wait(_END_S)
        raise


def _opened(path: Path) -> Image.Image | None:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:  # deleted or damaged: no reason to stop a training
        logger.warning("MaPO: no preview of %s: %s", path, error)
        return None


def _show(run: RunDir, events: list[Event], bar: _comfy.Progress, node_id: str, steps: int) -> None:
    _comfy.send("mapo.progress", node=node_id, run=run.name, events=events)
    sheets = [run.path / e["path"] for e in events if e["type"] == "sample_saved"]
    last: dict[str, Any] = next((e for e in reversed(events) if e["type"] == "step"), {})
    preview = _opened(sheets[-1]) if sheets else None
    if last or preview is not None:
        bar.show(last.get("step") or run_status(run).step, steps, preview)
