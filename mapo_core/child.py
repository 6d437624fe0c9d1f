"""The process that trains: what `mapo_core/__main__.py train <run folder>` runs."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING

from .errors import MapoError
from .runs import EventWriter, RequestWatcher, acquire_run_lock, checkpoint_step, clean_leftovers, watch_parent

if TYPE_CHECKING:
    from .runs import RunDir

logger = logging.getLogger(__name__)

SAVE_LIMIT_S = 20.0  # torchrun ends by force what is still there 30 s after it has asked
ORPHAN_LIMIT_S = 60.0  # how long a tied child may take to save its work after its parent has died


def run_child(run: RunDir, lifetime: str) -> int:
    """Train a run to its end or to a stop; the exit code is 0 unless it failed.

    A failure becomes a `run_failed` event with its cause; the traceback goes to train.log. Under `accelerate launch`
    or torchrun only the first process writes events and answers requests.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if "RANK" not in os.environ and (processes := _training(run, "processes") or 1) > 1:
        from .processes import launch

        return launch(run, processes, lifetime)
    if int(os.environ.get("RANK", "0")) > 0:
        from .trainer import train

        train(run, None, None)
        return 0
    parent_gone = threading.Event()
    if lifetime == "tied":
        watch_parent(parent_gone.set)
    with acquire_run_lock(run):
        clean_leftovers(run)
        began_before = run.events.exists()
        newest = run.latest_checkpoint()
        with (
            EventWriter(run) as events,
            RequestWatcher(run, on_stop_seen=lambda: events.emit("phase", phase="stopping")) as watcher,
        ):
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                _time_to_save(watcher)
            kind = "run_resumed" if began_before else "run_started"
            events.emit(kind, checkpoint_step(newest) if newest else 0, steps=_training(run, "steps"))
            threading.Thread(target=_when_orphaned, args=(parent_gone, watcher), daemon=True).start()
            return _train(run, events, watcher)


def _training(run: RunDir, field: str) -> int | None:
    """A number of the training settings, if they can be read; what is wrong with them is said later."""
    try:
        found = json.loads(run.config.read_text(encoding="utf-8"))["training"][field]
        return found if isinstance(found, int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _train(run: RunDir, events: EventWriter, watcher: RequestWatcher) -> int:
    try:
        from .trainer import train

        train(run, events, watcher)
        return 0
    except MapoError as error:
        logger.error("%s", error)
        events.emit("run_failed", message=str(error), error=type(error).__name__)
    except Exception as error:
        traceback.print_exc()
        events.emit("run_failed", message=explain(error), error=type(error).__name__)
    return 1


def explain(error: Exception) -> str:
    """An unexpected failure in words that help."""
    text = (f"{type(error).__name__}: {error}".splitlines() or [type(error).__name__])[0]
    if type(error).__name__ == "OutOfMemoryError" or "not enough memory" in str(error):
        return (
            "The device ran out of memory. Close other programs that use it, switch on "
            "training.gradient_checkpointing, lower training.train_batch_size (and raise gradient_accumulation_steps), "
            f"data.resolution or adapter.rank, and start again. ({text})"
        )
    return f"{text} (the traceback is in train.log)"


def _time_to_save(watcher: RequestWatcher) -> None:
    """When the launcher ends all processes because one is lost, this one may first keep its work, a little while.

    Between two steps that is a stop. In a step, what it waits for fails because of the lost one (`trainer.work_kept`).
    """

    def told(*_: object) -> None:
        if watcher.stop_requested.is_set():  # a stop is on its way, and someone does not want to wait for it
            os._exit(143)
        watcher.stop_requested.set()
        end = threading.Timer(SAVE_LIMIT_S, os._exit, (143,))
        end.daemon = True
        end.start()

    signal.signal(signal.SIGTERM, told)


def _when_orphaned(parent_gone: threading.Event, watcher: RequestWatcher) -> None:
    """When the parent is gone: stop after the current step, keep the work, and be gone soon whatever happens."""
    parent_gone.wait()
    sys.stderr.write("The parent process has ended: stopping after this step.\n")
    watcher.stop_requested.set()
    time.sleep(ORPHAN_LIMIT_S)
    os._exit(75)
