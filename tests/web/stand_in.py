"""The page with a trainer that only counts: what takes the real one half a minute takes this one a second.

`stand_in.py --port ...` serves the page; its runs are `stand_in.py train RUN ...`, its queue `stand_in.py queue run`.
Seconds per step: the variable STAND_IN_STEP_S.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:] = [str(HERE.parents[2]), *(p for p in sys.path if Path(p or ".").resolve() != HERE.parent)]

from mapo_core.runs import (  # noqa: E402
    EventWriter,
    RequestWatcher,
    RunDir,
    acquire_run_lock,
    checkpoint_step,
    clean_leftovers,
    folder_atomic,
    launch,
    open_run,
    run_queue,
    write_atomic,
)


def train(run: RunDir) -> None:
    """Be the trainer of a run."""
    steps = json.loads(run.config.read_text(encoding="utf-8"))["training"]["steps"]
    with acquire_run_lock(run), EventWriter(run) as events:
        clean_leftovers(run)
        newest = run.latest_checkpoint()
        step = checkpoint_step(newest) if newest else 0
        events.emit("run_resumed" if run.events.stat().st_size else "run_started", step, steps=steps)
        with RequestWatcher(run, lambda: events.emit("phase", step, phase="stopping")) as asked:
            step = _steps(run, events, asked, step, steps)
            _save(run, events, step)
            write_atomic(run.export / f"{run.name}.safetensors", f"step {step}")
            stopped = asked.stop_requested.is_set() and step < steps
            events.emit("run_stopped" if stopped else "run_finished", step)
            if stopped:
                run.answer("stop")


def _steps(run: RunDir, events: EventWriter, asked: RequestWatcher, step: int, steps: int) -> int:
    pace = float(os.environ.get("STAND_IN_STEP_S", "0.1"))
    while step < steps and not asked.stop_requested.wait(pace):
        step += 1
        errors = {"chosen_mse": 0.05 / step, "rejected_mse": 0.08 / step}
        events.emit(
            "step",
            step,
            loss=1 / step,
            **errors,
            learning_rate=1e-4,
            peak_memory_bytes=2e9,
            seconds_left=(steps - step) * pace,
            seconds_per_step=pace,
        )
        if step % 5 == 0:
            events.emit("evaluated", step, accuracy=1 - 1 / step, margin=0.1, base={"accuracy": 0.5, "margin": 0.0})
        for verb in ("save", "sample"):
            if asked.take(verb):
                _save(run, events, step) if verb == "save" else _draw(run, events, step)
                run.answer(verb)
        if asked.pause_requested.is_set():
            events.emit("paused", step)
            run.answer("pause")
            while asked.pause_requested.is_set() and not asked.stop_requested.wait(0.02):
                pass
            events.emit("phase", step, phase="training")
    return step


def _save(run: RunDir, events: EventWriter, step: int) -> None:
    with folder_atomic(run.checkpoint_path(step)) as folder:
        (folder / "state.txt").write_text(str(step))
    events.emit("checkpoint_saved", step)


def _draw(run: RunDir, events: EventWriter, step: int) -> None:
    from PIL import Image

    name = f"samples/step_{step:08d}.png"
    Image.new("RGB", (128, 64), (40, 120, 110)).save(run.path / name)
    events.emit("sample_saved", step, path=name, prompts=["a house"])


if __name__ == "__main__":
    launch.MAIN = HERE
    if sys.argv[1:2] == ["train"]:
        limit = threading.Timer(600, os._exit, [4])  # whatever becomes of the test, this does not stay
        limit.daemon = True
        limit.start()
        train(open_run(sys.argv[2]))
    elif sys.argv[1:3] == ["queue", "run"]:
        run_queue()
    else:
        from web.gradio_app.server import main

        sys.exit(main(sys.argv[1:]))
