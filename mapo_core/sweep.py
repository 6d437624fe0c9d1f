"""A small grid of settings, each trained for the same number of steps, measured and ranked. Every trial is a run."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from .config import build_config, set_value
from .errors import ConfigError, MapoError, RunError
from .evaluate import Interval, read_evaluation
from .runs import EventTail, RunDir, create_run, mapo_home, open_run, run_job, run_status, start_run, write_atomic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from .config import TrainConfig
    from .pairs import PreferencePair

EQUAL = ("training.", "data.", "model.", "validation.", "cache.", "checkpoint.", "export.", "name", "seed", "parent")
ACCURACY, MARGIN = "accuracy", "margin"
_POLL_S = 0.2
_STOP_S = 120.0  # how long a trial may take to save its work when the sweep is interrupted


@dataclass(frozen=True)
class Trial:
    """One point of the grid.

    Attributes:
        run: name of its run folder.
        values: what it has of its own, by setting.
        measures: "accuracy" and "margin" on held-out pairs, and the win rate per scorer.
        chosen_error: K_w with the LoRA / K_w of the base model on held-out pairs; above 1 the LoRA has moved away from
            the chosen images. None where no pair was held out.
        drift: relative to the base model's error; None where it was not measured.
        message: why there are no measures; empty where there are.
        like_best: its interval overlaps that of the first one: the sweep does not tell them apart.
    """

    run: str
    values: dict[str, Any]
    measures: dict[str, Interval]
    chosen_error: float | None = None
    drift: float | None = None
    message: str = ""
    like_best: bool = False


@dataclass(frozen=True)
class Sweep:
    """All trials, the best first.

    Attributes:
        name: of the sweep.
        rank_by: the measure that ranks.
        steps: optimizer steps of every trial.
        trials: ranked; failed ones last.
        seconds: of this call; earlier ones are not counted.
    """

    name: str
    rank_by: str
    steps: int
    trials: tuple[Trial, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def render(self) -> str:
        """For people, as lines."""
        names = list(dict.fromkeys(k for t in self.trials for k in t.measures))
        head = ["run", "settings", *names, "chosen error", "drift"]
        rows = [head]
        for t in self.trials:
            cells = [str(t.measures[n]) if n in t.measures else "" for n in names]
            error = "" if t.chosen_error is None else f"{t.chosen_error:.2f} of base"
            drift = "" if t.drift is None else f"{t.drift:.2f} of error"
            settings = " ".join(f"{k.rpartition('.')[2]}={v}" for k, v in t.values.items())
            rows.append([t.run, settings, *cells, error, drift])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [f"Sweep {self.name}: {self.steps} steps each, ranked by {self.rank_by}; [95 % bootstrap intervals]"]
        lines += ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        alike = [t.run for t in self.trials[1:] if t.like_best]
        if alike:
            lines.append(f"Not told apart from the first (intervals overlap): {', '.join(alike)}")
        lines += [f"{t.run} failed: {t.message}" for t in self.trials if t.message]
        lines.append("One seed each: repeat the best ones with other seeds before believing a small difference.")
        return "\n".join(lines)


def grid_points(grid: Mapping[str, Sequence[str]]) -> list[dict[str, str]]:
    """Every combination, the last setting changing fastest.

    Raises:
        ConfigError: there is nothing to vary, or a setting that would make the budgets unequal.
    """
    if not grid:
        raise ConfigError("Name what to vary: --grid method.beta=8,32,64 or --grid optimizer.learning_rate=1e-4,1e-3.")
    for name, values in grid.items():
        if name.startswith(EQUAL):
            raise ConfigError(
                f"--grid {name}: all trials have the same data and steps; vary method, optimizer, adapter."
            )
        if not values:
            raise ConfigError(f"--grid {name}: give values, for example {name}=1,2,3.")
    return [dict(zip(grid, point, strict=True)) for point in itertools.product(*grid.values())]


def run_sweep(
    values: dict[str, Any],
    pairs: str | Sequence[PreferencePair],
    grid: Mapping[str, Sequence[str]],
    *,
    evaluate: Mapping[str, Any] | None = None,
    rank_by: str = ACCURACY,
    train: Callable[[RunDir, Callable[[int, int], None]], None] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    phase: Callable[[str], None] = lambda name: None,
) -> Sweep:
    """Train and measure every point of a grid, one process at a time. The same call again goes on where it was.

    Args:
        values: settings that all trials share, unchecked; `name` names the sweep.
        pairs: to train on, or as the content of pairs.jsonl.
        grid: setting -> values as text, for example {"method.beta": ["8", "32"]}.
        evaluate: arguments of `jobs.evaluate` beside the run, for example {"scorers": ["clip"]}.
        rank_by: "accuracy" or "margin" on held-out pairs, or the name of a scorer that `evaluate` uses.
        train: trains a run to its end; None does so in a child process.
        progress: called with steps (or what is measured) done and in all, anew in each phase.
        phase: called with what is being done.

    Returns:
        The ranked trials, also in `sweeps/<name>/result.json` and `result.txt` under `MAPO_HOME`.

    Raises:
        ConfigError: a point of the grid is not a valid config, said before anything is trained.
        RunError: the name belongs to a sweep with other settings, pairs or values.
        MapoError: nothing could be measured, or not by `rank_by`.
    """
    started = time.monotonic()
    points = grid_points(grid)
    name = str(values.get("name", ""))
    configs = [_config(values, point, f"{name}-{i:02d}") for i, point in enumerate(points, start=1)]
    folder = mapo_home() / "sweeps" / _config(values, {}, name).name
    key = _key(configs, _lines(pairs))
    names = _open(folder, key, len(points))
    trials: list[Trial] = []
    for i, (config, point) in enumerate(zip(configs, points, strict=True)):
        if names[i] is None:
            names[i] = create_run(config.name, config.to_json(), _lines(pairs)).name
            _save(folder, key, names)
        run = open_run(names[i] or "")
        shown = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in point.items())
        try:
            if run_status(run).state != "finished":
                phase(f"trial {i + 1} of {len(points)}, training with {shown}")
                (train or train_in_child)(run, progress)
            phase(f"trial {i + 1} of {len(points)}, measuring")
            report = _evaluation(run, dict(evaluate or {}), progress)
        except MapoError as error:
            trials.append(Trial(run.name, point, {}, message=str(error)))
        else:
            trials.append(_trial(run.name, point, report))
    found = Sweep(
        name=folder.name,
        rank_by=rank_by,
        steps=configs[0].training.steps,
        trials=tuple(rank(trials, rank_by)),
        seconds=round(time.monotonic() - started, 1),
    )
    write_atomic(folder / "result.json", json.dumps(found.as_dict(), indent=2, ensure_ascii=False) + "\n")
    write_atomic(folder / "result.txt", found.render() + "\n")
    return found


def _lines(pairs: str | Sequence[PreferencePair]) -> Iterable[str]:
    """The content of pairs.jsonl, in pieces."""
    from .pairs import pair_lines

    return [pairs] if isinstance(pairs, str) else pair_lines(pairs)


def _key(configs: Iterable[TrainConfig], lines: Iterable[str]) -> str:
    """What was asked for, as one number."""
    digest = hashlib.sha256()
    for text in chain((config.to_json() for config in configs), lines):
        digest.update(text.encode())
    return digest.hexdigest()


def rank(trials: Sequence[Trial], rank_by: str) -> list[Trial]:
    """The best first, equal ones by their margin; failed ones last.

    Raises:
        MapoError: no trial has this measure.
    """
    measured = [t for t in trials if rank_by in t.measures]
    if not measured:
        there = ", ".join(dict.fromkeys(k for t in trials for k in t.measures))
        reasons = " ".join(dict.fromkeys(t.message for t in trials if t.message))
        said = f"there are {there}." if there else f"nothing was measured. {reasons}"
        raise MapoError(f"The trials cannot be ranked by {rank_by}: {said}")

    def value(trial: Trial, name: str) -> float:
        return trial.measures[name].value if name in trial.measures else float("-inf")

    measured.sort(key=lambda t: (value(t, rank_by), value(t, MARGIN)), reverse=True)
    best = measured[0].measures[rank_by]
    marked = [replace(t, like_best=t is not measured[0] and t.measures[rank_by].high >= best.low) for t in measured]
    return [*marked, *(t for t in trials if rank_by not in t.measures)]


def train_in_child(run: RunDir, progress: Callable[[int, int], None]) -> None:
    """Train a run, or go on with it, in a process of its own. Ctrl-C stops it after its step and keeps the work.

    Raises:
        RunError: it did not finish.
    """
    tail = EventTail(run.events)
    handle = start_run(run)
    try:
        while handle.is_alive():
            for event in tail.poll():
                if event["type"] == "step":
                    progress(event["step"], event["steps"])
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        handle.request("stop")
        handle.wait(_STOP_S)
        raise
    finally:
        handle.close()
    status = handle.wait(10)
    if status.state != "finished":
        raise RunError(f"Run {run.name} is {status.state}: {status.message or f'see {run.log}'}")


def _config(values: dict[str, Any], point: Mapping[str, str], name: str) -> Any:
    own = json.loads(json.dumps(values, default=str))
    for setting, text in point.items():
        set_value(own, setting, text)
    if isinstance(method := own.get("method"), dict):
        method.setdefault("type", "mapo")
    own["name"] = name
    where = "the grid at " + ", ".join(f"{k}={v}" for k, v in point.items()) if point else "settings"
    return build_config(own, where)


def _open(folder: Path, key: str, count: int) -> list[str | None]:
    """The runs of an earlier call, or as many gaps."""
    path = folder / "sweep.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return [None] * count
    state = json.loads(path.read_text(encoding="utf-8"))
    if state["key"] != key:
        raise RunError(f"There is a sweep {folder.name} with other settings, pairs or values: choose another --name.")
    return state["runs"]


def _save(folder: Path, key: str, names: list[str | None]) -> None:
    write_atomic(folder / "sweep.json", json.dumps({"key": key, "runs": names}) + "\n")


def _evaluation(run: RunDir, options: dict[str, Any], progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The run's report; measured in a process of its own where it is not there with these options."""
    asked = run.evaluation / "sweep_options.json"
    text = json.dumps(options, sort_keys=True)
    known = read_evaluation(run)
    if known is not None and asked.exists() and asked.read_text(encoding="utf-8") == text:
        return known
    arguments = {"run": str(run.path), **options}
    report = run_job("evaluate", arguments, progress=lambda _, done, total: progress(done, total))
    write_atomic(asked, text)
    return report["evaluation"]


def _trial(run: str, values: dict[str, Any], report: dict[str, Any]) -> Trial:
    measures: dict[str, Interval] = {}
    held, chosen_error = report["held_out"], None
    if held is not None:
        base = held["base"]["margin"]
        gain = Interval(**held["margin_gain"])
        measures[ACCURACY] = Interval(**held["accuracy"])
        measures[MARGIN] = Interval(base + gain.value, base + gain.low, base + gain.high)
        chosen_error = held["lora"]["chosen_mse"] / held["base"]["chosen_mse"]
    measures |= {s["name"]: Interval(**s["win_rate"]) for s in report["scores"]}
    drift = report["drift"]["relative"] if report["drift"] else None
    return Trial(run, values, measures, chosen_error, drift)
