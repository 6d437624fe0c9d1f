"""Stand-in for the trainer: uses mapo_core.runs as it does, with an integer for a model.

As a program it is `stand_in.py train RUN --lifetime L` (what start_run starts) or `stand_in.py session HOME`.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mapo_core.runs import (
    EventWriter,
    RequestWatcher,
    RunDir,
    acquire_run_lock,
    checkpoint_step,
    clean_leftovers,
    create_run,
    folder_atomic,
    launch,
    list_runs,
    open_run,
    remove_folder,
    run_queue,
    watch_parent,
    write_atomic,
)

NAME = "Nacht ü 夜"
SESSION = {"steps": 3, "every": 2, "save_at": 2}


def session(home: Path) -> RunDir:
    """Make the run if it is not there, and train it to its end."""
    runs = list_runs(home)
    run = runs[0] if runs else create_run(NAME, json.dumps(SESSION), '{"prompt": "a house"}\n', home)
    train(run)
    return run


def train(run: RunDir) -> None:
    settings: dict[str, Any] = json.loads(run.config.read_text(encoding="utf-8"))
    if settings.get("ignore_term"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if settings.get("crash"):
        raise RuntimeError("no such model: größer")
    with acquire_run_lock(run, wait_s=0.2), EventWriter(run) as events:
        clean_leftovers(run)
        _steps(run, events, settings)


def _steps(run: RunDir, events: EventWriter, settings: dict[str, Any]) -> None:
    latest = run.latest_checkpoint()
    step, state = (checkpoint_step(latest), load_state(latest)) if latest else (0, 7)
    events.emit("run_resumed" if latest else "run_started", step, steps=settings["steps"])
    with RequestWatcher(run, lambda: events.emit("phase", step, phase="stopping")) as watcher:
        while step < settings["steps"] and not watcher.stop_requested.is_set():
            time.sleep(settings.get("step_s", 0))
            step += 1
            state = next_state(state, step)
            events.emit("step", step, loss=state)
            if step == settings.get("save_at"):
                run.request("save")
            if step % settings.get("every", 1000) == 0:
                save(run, events, step, state)
            if watcher.take("save"):
                save(run, events, step, state)
                run.answer("save")
            if watcher.pause_requested.is_set():
                events.emit("paused", step)
                run.answer("pause")
                while watcher.pause_requested.is_set() and not watcher.stop_requested.is_set():
                    time.sleep(0.01)
                events.emit("phase", step, phase="training")
        save(run, events, step, state)
        if watcher.stop_requested.is_set():
            events.emit("run_stopped", step)
            run.answer("stop")
        else:
            write_atomic(run.export / "ü.safetensors", str(state))
            events.emit("run_finished", step)


def next_state(state: int, step: int) -> int:
    return (state * 31 + step) % 1_000_003


def save(run: RunDir, events: EventWriter, step: int, state: int) -> None:
    """Keeps one checkpoint: its state, and the state's hash in a second file."""
    with folder_atomic(run.checkpoint_path(step)) as folder:
        (folder / "state.txt").write_text(str(state))
        write_atomic(folder / "hash.txt", hashlib.sha256(str(state).encode()).hexdigest())
    events.emit("checkpoint_saved", step)
    for path in run.list_checkpoints()[:-1]:
        remove_folder(path)


def load_state(checkpoint: Path) -> int:
    """The state of a checkpoint, which must be complete and whole."""
    state = (checkpoint / "state.txt").read_text()
    assert hashlib.sha256(state.encode()).hexdigest() == (checkpoint / "hash.txt").read_text()
    return int(state)


if __name__ == "__main__":
    if sys.argv[1] == "session":
        session(Path(sys.argv[2]))
    elif sys.argv[1:3] == ["queue", "run"]:
        launch.MAIN = Path(__file__).resolve()
        run_queue()
    else:
        if sys.argv[4] == "tied":
            watch_parent(lambda: os._exit(3))
        # Whatever becomes of the test, its process does not stay.
        limit = threading.Timer(120, os._exit, [4])
        limit.daemon = True
        limit.start()
        train(open_run(sys.argv[2]))
