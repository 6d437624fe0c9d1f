"""What the page shows of a run: words, tables of points and pictures, read from its folder."""

from __future__ import annotations

import html
import json
import time
from typing import Any

import gradio as gr
import pandas as pd

from mapo_core import ConfigError
from mapo_core.runs import (
    RunDir,
    RunStatus,
    best_step,
    checkpoint_step,
    queue_entries,
    queue_state,
    reader_of,
    run_status,
)

POINTS = 400  # more than a chart on the page has pixels to show apart
LOG_BYTES = 5000
NEWEST_SAMPLES = 12
BEST, LAST = "best", "last"  # of a run's checkpoints

_COLOURS = ("#0d9488", "#ea580c", "#6366f1", "#ca8a04", "#db2777", "#0284c7", "#65a30d", "#9333ea")  # on light and dark

ACTIVE = ("running", "paused", "stopping", "waiting", "starting")
RESUMABLE = ("created", "stopped", "failed", "interrupted")
_WORDS = {
    "created": "not started",
    "waiting": "waiting in the queue",
    "starting": "starting",
    "running": "training",
    "stopping": "stopping and saving",
}


def state_of(run: RunDir) -> tuple[str, RunStatus]:
    """The run's state as a person means it, and its status."""
    status = run_status(run)
    return queue_state(run, status, run.path.parents[1]), status


def step_of(run: RunDir, word: str | None) -> int:
    """The step that a choice means.

    Raises:
        ConfigError: there is no checkpoint.
    """
    found = best_step(run) if word in (None, "", BEST) else None
    if word == LAST and (latest := run.latest_checkpoint()):
        found = checkpoint_step(latest)
    if word and word not in (BEST, LAST):
        found = int(word)
    if found is None:
        raise ConfigError(f"Run {run.name} has no checkpoint yet. Train it first, or press Save now on the Train page.")
    return found


def stamp(run: RunDir) -> tuple[Any, ...]:
    """Changes when there is something new to show."""
    state, status = state_of(run)
    sizes = [path.stat().st_size if path.exists() else 0 for path in (run.events, run.log)]
    return (run.name, state, status.alive, *sizes)


def badge(state: str) -> str:
    """A state as a coloured word."""
    return f"<span class='mapo-badge {state}'>{_WORDS.get(state, state)}</span>"


def status_html(run: RunDir) -> str:
    """State, progress, time left, and what it is doing or why it ended."""
    state, status = state_of(run)
    steps = status.steps or steps_asked(run)
    share = 100 * status.step / steps if steps else 0
    facts = [f"Step <b>{status.step}</b> of {steps or '?'}"]
    metrics = status.metrics
    if state == "running" and isinstance(left := metrics.get("seconds_left"), int | float):
        facts.append(f"<b>{duration(left)}</b> left")
    if isinstance(pace := metrics.get("seconds_per_step"), int | float):
        facts.append(f"{pace:.2g} s per step")
    measured = reader_of(run).events("evaluated")
    if measured and isinstance(accuracy := measured[-1].get("accuracy"), int | float):
        facts.append(f"held-out accuracy {accuracy:.0%}")
    return (
        f"<div class='mapo-status'><div><b>{html.escape(run.name)}</b> {badge(state)}</div>"
        f"<div class='mapo-bar'><div style='width:{share:.1f}%'></div></div>"
        f"<div class='mapo-facts'>{''.join(f'<span>{fact}</span>' for fact in facts)}</div>"
        f"<div>{html.escape(doing(run, state, status))}</div></div>"
    )


def read_config(run: RunDir) -> dict[str, Any]:
    """The settings as they stand; a run of another version is shown all the same."""
    try:
        found = json.loads(run.config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def steps_asked(run: RunDir) -> int:
    """How many steps the run is to take, 0 if that is not known."""
    steps = (read_config(run).get("training") or {}).get("steps")
    return steps if isinstance(steps, int) else 0


def doing(run: RunDir, state: str, status: RunStatus) -> str:
    """What is going on, or what to do next."""
    if state == "waiting":
        waiting = [entry.run for entry in queue_entries(run.path.parents[1]) if entry.waiting]
        place = waiting.index(run.name) + 1 if run.name in waiting else 1
        return f"Place {place} in the queue. It starts when the runs before it have ended, also with this page closed."
    if state == "starting":
        return "The training process is starting."
    if state == "failed":
        problem = next((e.problem for e in queue_entries(run.path.parents[1]) if e.run == run.name and e.problem), "")
        return problem or status.message
    if state in ("running", "stopping", "paused"):
        phase = reader_of(run).phase() or {}
        words = str(phase.get("phase") or "training")
        if phase.get("total"):
            words += f" {phase.get('done', 0)}/{phase['total']}"
        return "Paused. Resume goes on from here." if state == "paused" else words.capitalize()
    if state in ("stopped", "interrupted"):
        saved = "its LoRA is saved" if lora_of(run) else "there was nothing to save yet"
        start = "" if state == "stopped" else "The process ended without a word. "
        return f"{start}Resume goes on from the last checkpoint; {saved}."
    if state == "finished":
        return "Finished. The Results page compares it with the base model."
    return "Start it with Resume."


def chart(table: pd.DataFrame | None, by: str = "line") -> dict[str, Any]:
    """The update of a line plot: its points, and a colour for each line.

    The page takes over new points without asking which lines there are; a change of the colours makes it look again.
    """
    if table is None or not len(table):
        return gr.update(value=None)
    lines = list(dict.fromkeys(table[by]))
    return gr.update(value=table, color_map={line: _COLOURS[i % len(_COLOURS)] for i, line in enumerate(lines)})


def curves(run: RunDir) -> dict[str, pd.DataFrame]:
    """The points of the charts, by chart: loss, margin, accuracy, learning_rate, memory."""
    reader = reader_of(run)
    names = ("loss", "margin", "chosen_mse", "rejected_mse", "learning_rate", "peak_memory_bytes")
    course = reader.curves(names, POINTS)
    measured = reader.events("evaluated")

    def lines(**of: str) -> pd.DataFrame:
        rows = [
            (step, value, title.replace("_", " "))
            for title, name in of.items()
            for step, value in zip(course.steps, course.values[name], strict=True)
            if value is not None
        ]
        return pd.DataFrame(rows, columns=["step", "value", "line"])

    def held_out(name: str) -> list[tuple[Any, ...]]:
        rows = [(e.get("step") or 0, e.get(name), "held out") for e in measured]
        base = next((e["base"].get(name) for e in measured if isinstance(e.get("base"), dict)), None)
        rows += [(e.get("step") or 0, base, "base") for e in measured] if base is not None else []
        return [row for row in rows if row[1] is not None]

    memory = lines(peak="peak_memory_bytes")
    memory["value"] = memory["value"] / 1e9
    margin = pd.concat(
        [lines(training="margin"), pd.DataFrame(held_out("margin"), columns=["step", "value", "line"])],
        ignore_index=True,
    )
    return {
        "loss": lines(loss="loss"),
        "errors": lines(chosen="chosen_mse", rejected="rejected_mse"),
        "margin": margin,
        "accuracy": pd.DataFrame(held_out("accuracy"), columns=["step", "value", "line"]),
        "learning_rate": lines(rate="learning_rate"),
        "memory": memory,
    }


def samples(run: RunDir) -> list[tuple[str, str]]:
    """The newest sheets of pictures with their steps, newest first."""
    found = []
    for event in reversed(reader_of(run).events("sample_saved")):
        path = run.path / str(event.get("path"))
        if path.is_file() and path.resolve().is_relative_to(run.path.resolve()):
            found.append((str(path), f"step {event.get('step')}"))
    return found[:NEWEST_SAMPLES]


def warnings(run: RunDir) -> list[str]:
    """What the trainer warned of."""
    kinds = ("warning", "memory_step_down", "rolled_back")
    return [str(e.get("message") or e["type"].replace("_", " ")) for e in reader_of(run).events(*kinds)]


def last_measure(run: RunDir) -> dict[str, Any]:
    """What was last measured on the held-out pairs; empty before."""
    return next(iter(reversed(reader_of(run).events("evaluated"))), {})


def log_tail(run: RunDir) -> str:
    """The end of the log, in whole lines, without what a progress bar has overwritten."""
    if not run.log.exists():
        return ""
    with run.log.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - LOG_BYTES))
        lines = file.read().decode("utf-8", errors="replace").replace("\r\n", "\n").split("\n")
    return "\n".join(line.rpartition("\r")[2] for line in (lines[1:] if size > LOG_BYTES else lines)).strip()


def lora_of(run: RunDir) -> str | None:
    """The run's LoRA file, if there is one."""
    path = run.export / f"{run.name}.safetensors"
    return str(path) if path.is_file() else None


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def ago(seconds: float) -> str:
    """A time in the past as people say it."""
    past = max(0.0, time.time() - seconds)
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if past >= size:
            return f"{int(past // size)} {name} ago"
    return "now"
