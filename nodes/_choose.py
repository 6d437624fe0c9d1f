"""Which run and which checkpoint a node is about."""

from __future__ import annotations

from comfy_api.latest import io

from ..mapo_core import RunError
from ..mapo_core.runs import RunDir, best_step, checkpoint_step, list_runs, open_run
from ._types import Run

NEWEST = "newest"
BEST, LAST = "best", "last"
LISTED = 200  # runs in the list; older ones are found by the text of Settings or by wiring


def run_inputs() -> list[io.Input]:
    """The two inputs that say which run: a link, or a name."""
    return [
        io.Combo.Input(
            "run_name",
            options=[NEWEST, *(run.name for run in list_runs()[:LISTED])],
            default=NEWEST,
            tooltip="Which training, unless a run is wired in.",
        ),
        Run.Input("run", optional=True, tooltip="The run output of Train LoRA; without it, run_name says which."),
    ]


def run_of(run_name: str, run: RunDir | None) -> RunDir:
    """The run that is wired in, or the one that is named.

    Raises:
        RunError: there is none.
    """
    if run is not None:
        return run
    if run_name != NEWEST:
        return open_run(run_name)
    known = list_runs()
    if not known:
        raise RunError("There is no run yet. Train one with Train LoRA (MaPO), or wire its run output in.")
    return known[0]


def step_of(run: RunDir, text: str) -> int:
    """The checkpoint that "best", "last" or a number names.

    Raises:
        RunError: there is no such checkpoint; the message names those that exist.
    """
    steps = [checkpoint_step(path) for path in run.list_checkpoints()]
    if not steps:
        raise RunError(f"Run {run.name} has no checkpoint yet: it was stopped before its first one.")
    words = text.strip().lower()
    if words == BEST:
        return best_step(run) or steps[-1]
    if words == LAST:
        return steps[-1]
    if words.isdigit() and int(words) in steps:
        return int(words)
    raise RunError(
        f"Run {run.name} has no checkpoint {text!r}. Write best, last, or one of {', '.join(map(str, steps))}."
    )
