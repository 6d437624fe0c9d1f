"""The report of reference_mismatch.py: tables, intervals, plots, and the answers that the figures allow.

Intervals are 95 % percentile bootstraps over seeds and captions together. Methods share captions, noise and seeds, so
a difference between two of them is resampled in pairs. Whatever cells are missing is said.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from mismatch_plots import Point, Series, plot
from mismatch_tasks import COUNTS, PAIRS, TASKS
from PIL import Image
from reference_mismatch import (
    BATCH,
    GRID,
    RATE,
    SEEDS,
    Cell,
    base_picture,
    cell_of,
    chosen_configuration,
    is_finished,
    read_cell,
)

from mapo_core.demo.run import SAMPLING
from mapo_core.evaluate.demo_world import DemoEmbedder
from mapo_core.evaluate.mismatch import mismatch_of
from mapo_core.evaluate.statistics import Interval, percentiles
from mapo_core.runs import write_atomic
from mapo_core.sampling import save_image

RESAMPLES = 2000
SAME = 0.05  # scores that differ by less are called the same
MAPO = ("mapo_paper", "mapo_official")


def write_report(work: Path, out: Path) -> None:
    """Write <out>.json, <out>.md and plots beside them, and keep the finished cells in <out>/."""
    out.mkdir(parents=True, exist_ok=True)
    for path in sorted((work / "cells").glob("*.json")):
        if is_finished(work, cell_of(path)):
            write_atomic(out / path.name, path.read_bytes())
    grid = Grid(work)
    mismatch = {name: reference_mismatch(name, work, out) for name in TASKS}
    order = sorted(TASKS, key=lambda t: mismatch[t]["raw"] if mismatch[t] else 9.0)
    record = {
        "command": "python benchmarks/reference_mismatch.py --report",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "order": order,
        "mismatch": mismatch,
        "scores": {t: {m: as_dict(grid.score(t, m)) for m in ("base", *GRID)} for t in order},
        "chosen": {t: {m: grid.chosen(t, m) for m in GRID} for t in order},
        "gains": {t: {m: as_dict(grid.difference(t, m, "diffusion_dpo")) for m in ("sft", *MAPO)} for t in order},
        "forms": {t: as_dict(grid.difference(t, "mapo_paper", "mapo_official")) for t in order},
        "overall": {
            m: {o: as_dict(over_tasks(grid, m, o)) for o in ("sft", "diffusion_dpo", "dco", "mapo_official") if o != m}
            for m in MAPO
        },
        "slopes": {m: as_dict(slope(grid, mismatch, m)) for m in MAPO},
        "betas": {t: grid.betas(t) for t in order},
        "large_beta_less_sft": {t: as_dict(grid.large_beta_less_sft(t)) for t in order},
        "cost": grid.cost(),
        "missing": grid.missing(),
        "hours_of_one_thread": round(grid.seconds() / 3600, 2),
    }
    write_atomic(out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    pictures = plots(record, out)
    write_atomic(out.with_suffix(".md"), markdown(record, pictures))
    print(out.with_suffix(".md"))


# --- numbers ---------------------------------------------------------------------------------------------------------


class Grid:
    """The finished cells, and what can be computed from them; None where a cell is missing."""

    def __init__(self, work: Path) -> None:
        self.work = work

    def cell(self, task: str, method: str, configuration: int, seed: int, split: str) -> dict[str, Any] | None:
        """A finished cell."""
        try:
            return read_cell(self.work, Cell(task, method, configuration, seed, split))
        except FileNotFoundError:
            return None

    def chosen(self, task: str, method: str) -> int | None:
        """The configuration that was best on the validation captions."""
        if method == "base":
            return 0
        try:
            return chosen_configuration(self.work, task, method)
        except FileNotFoundError:
            return None

    def table(self, task: str, method: str, configuration: int | None, split: str) -> np.ndarray | None:
        """[seeds, captions, (wanted x right, right, ordinary)] of the seeds that are there."""
        if method == "base":
            found = [self.cell(task, "base", 0, 0, split)] * len(SEEDS)
        elif configuration is None:
            return None
        else:
            found = [self.cell(task, method, configuration, s, split) for s in SEEDS]
        there = [c for c in found if c is not None]
        if len(there) < len(SEEDS):
            return None
        return np.array(
            [[(i["wanted"] * i["right"], i["right"], i["ordinary"]) for i in c["items"]] for c in there], np.float64
        )

    def score(self, task: str, method: str) -> Interval | None:
        """Test score of the chosen configuration."""
        values = self.table(task, method, self.chosen(task, method), "test")
        return None if values is None else interval(lambda pick: scored(values, pick), values)

    def difference(self, task: str, method: str, other: str) -> Interval | None:
        """Test score of a method less that of another one, in pairs."""
        a = self.table(task, method, self.chosen(task, method), "test")
        b = self.table(task, other, self.chosen(task, other), "test")
        return paired(a, b)

    def large_beta_less_sft(self, task: str) -> Interval | None:
        """Validation score of the largest beta of MaPO's paper form less that of SFT, same learning rate."""
        last = len(GRID["mapo_paper"]) - 1
        same_rate = next(i for i, c in enumerate(GRID["sft"]) if c["learning_rate"] == RATE)
        return paired(
            self.table(task, "mapo_paper", last, "validation"), self.table(task, "sft", same_rate, "validation")
        )

    def betas(self, task: str) -> list[dict[str, Any]]:
        """Validation score by beta of the paper's form, and how often each is the best of a resample."""
        tables = [self.table(task, "mapo_paper", c, "validation") for c in range(len(GRID["mapo_paper"]))]
        found = [{"beta": c["method"]["beta"], "score": None, "best": None} for c in GRID["mapo_paper"]]
        whole = [t for t in tables if t is not None]
        for entry, values in zip(found, tables, strict=True):
            if values is not None:
                entry["score"] = as_dict(interval(lambda pick, v=values: scored(v, pick), values))
        if len(whole) == len(tables):
            rng = np.random.default_rng(0)
            wins = np.zeros(len(tables))
            for _ in range(RESAMPLES):
                pick = picks(rng, whole[0])
                wins[int(np.argmax([scored(v, pick) for v in whole]))] += 1
            for entry, count in zip(found, wins / RESAMPLES, strict=True):
                entry["best"] = round(float(count), 3)
        return found

    def all_cells(self) -> list[dict[str, Any]]:
        """Every finished cell."""
        cells = [cell_of(p) for p in sorted((self.work / "cells").glob("*.json"))]
        return [read_cell(self.work, c) for c in cells if is_finished(self.work, c)]

    def cost(self) -> dict[str, dict[str, float] | None]:
        """Per method: seconds per step and memory, over its cells that were trained."""
        found: dict[str, dict[str, float] | None] = {}
        for method in GRID:
            cells = [c for c in self.all_cells() if c["method"] == method and c.get("trained_in_this_cell")]
            found[method] = None
            if cells:
                memory = [(c["peak_memory_bytes"] - c["memory_before_bytes"]) / 2**20 for c in cells]
                found[method] = {
                    "cells": len(cells),
                    "fastest_tenth_seconds_per_step": min(c["fastest_tenth_seconds_per_step"] for c in cells),
                    "median_seconds_per_step": statistics.median(c["seconds_per_step"] for c in cells),
                    "memory_mib": round(statistics.median(memory), 1),
                    "load_average_low": min(min(c["load_average"]) for c in cells),
                    "load_average_high": max(max(c["load_average"]) for c in cells),
                }
        return found

    def seconds(self) -> float:
        """Of all cells together."""
        return sum(c["seconds"] for c in self.all_cells())

    def missing(self) -> list[str]:
        """What the grid still lacks, in words."""
        lines: list[str] = []
        for task in TASKS:
            for method in GRID:
                validation = [self.cell(task, method, c, SEEDS[0], "validation") for c in range(len(GRID[method]))]
                lacking = sum(c is None for c in validation)
                if lacking:
                    lines.append(f"{task}, {method}: {lacking} of {len(validation)} configurations, so no test score")
                    continue
                seeds = [s for s in SEEDS if self.cell(task, method, self.chosen(task, method) or 0, s, "test") is None]
                if seeds:
                    lines.append(f"{task}, {method}: test captions with seeds {', '.join(map(str, seeds))}")
            if any(b["score"] is None for b in self.betas(task)):
                lines.append(f"{task}: the other seeds of MaPO's betas")
            if self.large_beta_less_sft(task) is None:
                lines.append(f"{task}: large beta against SFT at the same learning rate")
        return lines


def picks(rng: np.random.Generator, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seeds and captions drawn with replacement; captions of the task and ordinary ones each among themselves."""
    seeds, captions = values.shape[:2]
    ordinary = values[0, :, 2] > 0
    kinds = [np.flatnonzero(~ordinary), np.flatnonzero(ordinary)]
    chosen = np.concatenate([rng.choice(k, len(k)) for k in kinds if len(k)])
    assert len(chosen) == captions
    return rng.integers(0, seeds, seeds), chosen


def scored(values: np.ndarray, pick: tuple[np.ndarray, np.ndarray] | None = None) -> float:
    """`reference_mismatch.score` of [seeds, captions, 3]: the mean over the seeds."""
    rows = values if pick is None else values[pick[0]][:, pick[1]]
    ordinary = rows[0, :, 2] > 0
    asked = rows[:, ~ordinary, 0].mean(axis=1)
    kept = rows[:, ordinary, 1].mean(axis=1) if ordinary.any() else 1.0
    return float((asked * kept).mean())


def interval(compute: Callable[[Any], float], like: np.ndarray) -> Interval:
    """A value and the interval of what it is in resamples."""
    rng = np.random.default_rng(0)
    return Interval(compute(None), *percentiles(np.array([compute(picks(rng, like)) for _ in range(RESAMPLES)])))


def paired(a: np.ndarray | None, b: np.ndarray | None) -> Interval | None:
    """The difference of two scores on the same seeds and captions."""
    if a is None or b is None:
        return None
    return interval(lambda pick: scored(a, pick) - scored(b, pick), a)


def over_tasks(grid: Grid, method: str, other: str) -> Interval | None:
    """Mean over the tasks of the difference of two methods' test scores; None where a task is missing."""
    tables: list[tuple[np.ndarray, np.ndarray]] = []
    for task in TASKS:
        a, b = (grid.table(task, m, grid.chosen(task, m), "test") for m in (method, other))
        if a is None or b is None:
            return None
        tables.append((a, b))

    def mean(rng: np.random.Generator | None) -> float:
        drawn = [(a, b, None if rng is None else picks(rng, a)) for a, b in tables]
        return statistics.fmean(scored(a, pick) - scored(b, pick) for a, b, pick in drawn)

    rng = np.random.default_rng(0)
    return Interval(mean(None), *percentiles(np.array([mean(rng) for _ in range(RESAMPLES)])))


def slope(grid: Grid, mismatch: dict[str, Any], method: str) -> Interval | None:
    """How the gain of a method over Diffusion-DPO changes per unit of mismatch: least squares over the tasks."""
    tables: list[tuple[float, np.ndarray, np.ndarray]] = []
    for task in TASKS:
        a = grid.table(task, method, grid.chosen(task, method), "test")
        b = grid.table(task, "diffusion_dpo", grid.chosen(task, "diffusion_dpo"), "test")
        if a is not None and b is not None and mismatch[task]:
            tables.append((mismatch[task]["raw"], a, b))
    if len(tables) < 3:
        return None
    x = np.array([u for u, _, _ in tables])

    def fit(rng: np.random.Generator | None) -> float:
        gains: list[float] = []
        for _, a, b in tables:
            pick = None if rng is None else picks(rng, a)
            gains.append(scored(a, pick) - scored(b, pick))
        return float(np.polyfit(x, gains, 1)[0])

    rng = np.random.default_rng(0)
    return Interval(fit(None), *percentiles(np.array([fit(rng) for _ in range(RESAMPLES)])))


def reference_mismatch(task: str, work: Path, out: Path) -> dict[str, Any] | None:
    """As `mapo mismatch` measures it, on the pictures kept of the task; `raw` is u before it is clipped to 0-1."""
    kept = out / "mismatch" / f"{task}.json"
    folder = work / "tasks" / task
    if not (folder / "pairs.jsonl").exists():
        return json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else None
    embedder = DemoEmbedder()

    def embed(paths: Sequence[Path]) -> np.ndarray:
        return embedder.embed([Image.open(p).convert("RGB") for p in paths]).numpy()

    prompts = [i for i in range(PAIRS) if base_picture(folder, 1, i).exists()]
    found = mismatch_of(
        embed([folder / "chosen" / f"{i:03d}.png" for i in prompts]),
        embed([base_picture(folder, 1, i) for i in prompts]),
        embed([base_picture(folder, 2, i) for i in prompts]),
        embedder=embedder.title,
        model="demo",
        seed=0,
        num_inference_steps=SAMPLING["num_inference_steps"],
        guidance_scale=SAMPLING["guidance_scale"],
    )
    values = found.as_dict()
    if found.different_prompts is not None:
        spread = found.same_prompt.value - found.different_prompts.value
        values["raw"] = (found.same_prompt.value - found.similarity.value) / spread
    write_atomic(kept, json.dumps(values, indent=1) + "\n")
    return json.loads(kept.read_text(encoding="utf-8"))


def as_dict(value: Interval | None) -> dict[str, float] | None:
    """For JSON."""
    return None if value is None else asdict(value)


# --- words and pictures ----------------------------------------------------------------------------------------------


def shown(value: dict[str, float] | None, signed: bool = False) -> str:
    """A value with its interval."""
    if value is None:
        return "missing"
    sign = "+" if signed else ""
    return f"{value['value']:{sign}.2f} ({value['low']:{sign}.2f} to {value['high']:{sign}.2f})"


def setting(method: str, configuration: int | None) -> str:
    """A configuration in a few words."""
    if configuration is None:
        return ""
    chosen = GRID[method][configuration]
    extra = {k: v for k, v in chosen["method"].items() if k not in {"type", "parametrisation"}}
    return ", ".join([*(f"{k} {v:g}" for k, v in extra.items()), f"rate {chosen['learning_rate']:g}"])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return [*lines, *(f"| {' | '.join(r)} |" for r in rows), ""]


def markdown(record: dict[str, Any], pictures: dict[str, str]) -> str:
    """The report."""
    order: list[str] = record["order"]
    lines = ["# The paper in miniature", ""]
    lines += paragraph(
        "Written by `python benchmarks/reference_mismatch.py --report`. Five tasks on the demo model, LoRA "
        "of rank 16 on "
        f"attention, feed-forward and convolutions, {BATCH} pairs per step, 8-bit Adam, cosine schedule, the "
        "same steps "
        "for all methods of a task. Three configurations per method and task, chosen with seed "
        f"{SEEDS[0]} on {COUNTS['validation']} validation captions; figures are means over {len(SEEDS)} seeds on "
        f"{COUNTS['test']} other captions, of combinations that were never trained on, with 95 % bootstrap intervals "
        "over seeds and captions. Pairs, captions and noise are the same for all methods. Not evidence about SDXL: one "
        "small model, five drawn tasks."
    )
    lines += paragraph(
        f"{record['machine']}, {record['date']}; {record['hours_of_one_thread']} hours of one thread so far, "
        "with other "
        "work on the machine."
    )
    lines += paragraph(
        "Pilots with one seed, before the grid, shaped its settings: the steps of a task were set with SFT alone; "
        f"{RATE:g} is the learning rate of the methods that spend their configurations on something else because SFT, "
        "DCO and MaPO learned there without losing objects or colours; Diffusion-DPO destroyed the pictures at 1e-3 "
        "with beta 20 and 200 on the general task and learned nothing at beta 2000 and lower rates on the style task; "
        "its set of configurations was therefore replaced once, in its favour, by the one that is used now."
    )
    if record["missing"]:
        lines += ["**The grid is not complete.** Missing, and therefore not in the figures below:", ""]
        lines += [*(f"- {m}" for m in record["missing"]), ""]
    lines += ["## Tasks, by measured reference mismatch", ""]
    lines += table(
        [
            "task",
            "stands for",
            "what is wanted",
            "steps",
            "mismatch",
            "unclipped",
            "suggested beta",
            "paper's best beta",
        ],
        [
            [
                t,
                TASKS[t].analogue,
                TASKS[t].what,
                str(TASKS[t].steps),
                *mismatch_cells(record["mismatch"][t]),
                f"{TASKS[t].paper_beta:g}",
            ]
            for t in order
        ],
    )
    lines += paragraph(
        "Embedding: features of the demo world's classifier, the offline fallback of `mapo mismatch`; the "
        "suggested beta "
        "is that command's heuristic, the paper's the best one of its Table 4."
    )
    lines += ["## Scores", ""]
    lines += paragraph(
        "How much of what is wanted the pictures have (0-1), where objects and colours are still right, else 0; for "
        "personalisation times the share of ordinary captions that are still right. In brackets the interval."
    )
    methods = ["base", *GRID]
    lines += table(["task", *methods], [[t, *(shown(record["scores"][t][m]) for m in methods)] for t in order])
    lines += ["Chosen configurations:", ""]
    lines += table(
        ["task", *GRID],
        [[t, *(setting(m, record["chosen"][t][m]) or "missing" for m in GRID)] for t in order],
    )
    lines += [f"![Scores]({pictures['scores']})", ""]
    lines += answers(record, pictures)
    return "\n".join(lines)


def paragraph(text: str) -> list[str]:
    """Text in lines of at most 118 characters, and an empty one."""
    return [*textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False), ""]


def mismatch_cells(found: dict[str, Any] | None) -> list[str]:
    """Three cells of the table of tasks."""
    if found is None:
        return ["missing"] * 3
    if found["mismatch"] is None:
        return ["not measurable", f"{found.get('raw', math.nan):.2f}", ""]
    return [shown(found["mismatch"]), f"{found['raw']:.2f}", str(found["beta"])]


def answers(record: dict[str, Any], pictures: dict[str, str]) -> list[str]:
    """The four questions."""
    order: list[str] = record["order"]
    lines = ["## Does the gain of MaPO over Diffusion-DPO grow with mismatch?", ""]
    compared = ("sft", *MAPO)
    lines += table(
        ["task", *(f"{m} less diffusion_dpo" for m in compared)],
        [[t, *(shown(record["gains"][t][m], signed=True) for m in compared)] for t in order],
    )
    for method in MAPO:
        found = record["slopes"][method]
        if found is None:
            lines += paragraph(f"{method}: too few tasks are complete.")
        else:
            word = (
                "grows" if found["low"] > 0 else "shrinks" if found["high"] < 0 else "neither grows nor shrinks clearly"
            )
            lines += paragraph(
                f"{method}: the gain {word}; {shown(found, signed=True)} per unit of (unclipped) mismatch, a straight "
                "line through the tasks."
            )
    lines += paragraph("The intervals are about captions and seeds; that there are only five tasks is not in them.")
    lines += [
        f"![Gain over Diffusion-DPO]({pictures['gains']})",
        "",
        "## Does the best beta grow?",
        "",
    ]
    lines += paragraph(
        "Paper form, all betas with all seeds, validation captions; in brackets how often a beta is the best "
        "of a resample."
    )
    betas = [c["method"]["beta"] for c in GRID["mapo_paper"]]
    lines += table(
        ["task", *(f"beta {b:g}" for b in betas), "best"],
        [[t, *(beta_cell(b) for b in record["betas"][t]), best_beta(record["betas"][t])] for t in order],
    )
    lines += [
        f"![Score by beta]({pictures['betas']})",
        "",
        "## Is a large beta the same as SFT?",
        "",
        f"Paper form with beta {betas[-1]:g} less SFT, same learning rate, validation captions.",
        "",
    ]
    lines += table(
        ["task", "difference", f"within {SAME}"],
        [
            [t, shown(record["large_beta_less_sft"][t], signed=True), same(record["large_beta_less_sft"][t])]
            for t in order
        ],
    )
    lines += ["## Which form of MaPO?", ""]
    overall = record["overall"]
    lines += table(
        ["task", "mapo_paper less mapo_official"],
        [
            *([t, shown(record["forms"][t], signed=True)] for t in order),
            ["mean of the tasks", shown(overall["mapo_paper"]["mapo_official"], signed=True)],
        ],
    )
    lines += paragraph("The form that is better over the tasks is the default of `method.parametrisation`.")
    lines += ["## All tasks together", "", "Mean of the tasks' differences in score.", ""]
    others = list(overall["mapo_paper"])
    lines += table(
        ["method", *(f"less {o}" for o in others)],
        [[m, *(shown(overall[m][o], signed=True) if o in overall[m] else "" for o in others)] for m in MAPO],
    )
    lines += ["## What do time and memory cost?", ""]
    sft = record["cost"]["sft"]
    rows: list[list[str]] = []
    for method, found in record["cost"].items():
        if found is None or sft is None:
            rows.append([method, "missing", "", "", ""])
            continue
        fastest = found["fastest_tenth_seconds_per_step"]
        rows.append(
            [
                method,
                f"{fastest:.3f} s",
                f"{fastest / sft['fastest_tenth_seconds_per_step']:.2f}",
                f"{found['median_seconds_per_step']:.3f} s",
                f"{found['memory_mib']:.0f} MiB",
            ]
        )
    lines += table(["method", "step, undisturbed", "to SFT", "step, median", "memory of training"], rows)
    loads = [f for f in record["cost"].values() if f]
    if loads:
        low, high = min(f["load_average_low"] for f in loads), max(f["load_average_high"] for f in loads)
        lines += paragraph(
            "One thread. Undisturbed: the tenth percentile of a run's steps, least over the runs; the median is "
            "what it "
            f"took beside other work (load average {low:.1f} to {high:.1f} on {os.cpu_count()} cores). Memory: peak of "
            "the process less what it had before the model was loaded."
        )
    return lines


def beta_cell(entry: dict[str, Any]) -> str:
    """A score and how often it is the best."""
    if entry["score"] is None:
        return "missing"
    often = "" if entry["best"] is None else f" [{100 * entry['best']:.0f} %]"
    return shown(entry["score"]) + often


def best_beta(entries: list[dict[str, Any]]) -> str:
    """The beta that wins in most resamples."""
    if any(e["best"] is None for e in entries):
        return "missing"
    best = max(entries, key=lambda e: e["best"])
    return f"{best['beta']:g}" + ("" if best["best"] >= 0.95 else " (not certain)")


def same(found: dict[str, float] | None) -> str:
    """Whether the interval lies within the margin, outside it, or neither."""
    if found is None:
        return "missing"
    if found["low"] >= -SAME and found["high"] <= SAME:
        return "yes"
    return "no" if found["low"] > SAME or found["high"] < -SAME else "cannot be told"


def plots(record: dict[str, Any], out: Path) -> dict[str, str]:
    """Draw the plots beside the report; their file names."""
    order: list[str] = record["order"]
    names = {k: f"{out.name}_{k}.png" for k in ("scores", "gains", "betas")}
    ticks = [(float(i), t) for i, t in enumerate(order)]

    def point(x: float, found: dict[str, float] | None) -> list[Point]:
        return [] if found is None else [Point(x, found["value"], found["low"], found["high"])]

    methods = ["base", *GRID]
    series = [
        Series(m, [p for i, t in enumerate(order) for p in point(i + 0.11 * (k - 2.5), record["scores"][t][m])])
        for k, m in enumerate(methods)
    ]
    save_image(
        plot("Score on test captions", series, ticks, "task, by mismatch", "score"), out.parent / names["scores"]
    )
    known = [t for t in order if record["mismatch"][t]]
    series = [
        Series(m, [p for t in known for p in point(record["mismatch"][t]["raw"] + 0.006 * k, record["gains"][t][m])])
        for k, m in enumerate(MAPO)
    ]
    ticks = [(record["mismatch"][t]["raw"], t) for t in known] or ticks
    title = "Gain over Diffusion-DPO"
    save_image(plot(title, series, ticks, "measured mismatch", "difference of scores"), out.parent / names["gains"])
    series = [
        Series(
            t,
            [p for b in record["betas"][t] for p in point(math.log2(b["beta"]) + 0.06 * k, b["score"])],
            line=True,
        )
        for k, t in enumerate(order)
    ]
    ticks = [(math.log2(c["method"]["beta"]), f"{c['method']['beta']:g}") for c in GRID["mapo_paper"]]
    title = "MaPO, paper form: score by beta, validation captions"
    save_image(plot(title, series, ticks, "beta", "score"), out.parent / names["betas"])
    return names
