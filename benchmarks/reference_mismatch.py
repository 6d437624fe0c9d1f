"""The paper in miniature: five tasks of growing reference mismatch, five methods, on the demo model and the CPU.

    python benchmarks/reference_mismatch.py --work build/reference_mismatch --jobs 2
    python benchmarks/reference_mismatch.py --work build/reference_mismatch --report

Every method has the same steps and three configurations per task. One seed chooses among them on validation captions;
the chosen one is then trained with three seeds and measured on other captions. Last come all betas of MaPO's paper
form, and SFT at their learning rate, with the remaining seeds. A finished cell is a file in --work/cells and is not
repeated; cells in --out are taken over, so an interrupted grid goes on, on another machine too. --report works with
whatever cells there are.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mismatch_tasks import COUNTS, PAIRS, TASKS, Item, Task  # noqa: E402
from PIL import Image  # noqa: E402

from mapo_core import TrainConfig, build_config, open_trained  # noqa: E402
from mapo_core.demo.run import SAMPLING, demo_values  # noqa: E402
from mapo_core.runs import (  # noqa: E402
    EventWriter,
    checkpoint_step,
    create_run,
    open_run,
    read_events,
    run_status,
    write_atomic,
)

RATE = 4e-3  # of the methods that spend their configurations on something else; SFT tries others, too
BATCH = 4  # pairs per step
SEEDS = (0, 1, 2)
NOISE_SEED = 9000  # of the test pictures; the same for every cell
MISMATCH_PROMPTS = 48
ORDER = ("style", "general", "personalisation", "safety", "culture")  # both ends first: a partial grid says more


def _grid() -> dict[str, list[dict[str, Any]]]:
    """The three configurations of each method: SFT has only its learning rate; the others spend theirs on beta.

    Diffusion-DPO's learning rates are lower: in pilots on the general task 1e-3 with beta 20 and 200 destroyed the
    pictures (K_w rose from 0.1 to 1.1), and on the style task beta 2000 stopped learning early whatever the rate. Beta
    20 is there for the tasks with large errors.
    """
    return {
        "sft": [{"learning_rate": r, "method": {"type": "sft"}} for r in (RATE / 2, RATE, 2 * RATE)],
        "diffusion_dpo": [
            {"learning_rate": r, "method": {"type": "diffusion_dpo", "beta": b}}
            for r, b in ((3e-4, 200.0), (1e-3, 20.0), (1e-3, 2000.0))
        ],
        "dco": [{"learning_rate": RATE, "method": {"type": "dco", "beta": b}} for b in (10.0, 100.0, 1000.0)],
        "mapo_paper": [
            {"learning_rate": RATE, "method": {"type": "mapo", "parametrisation": "paper", "beta": b}}
            for b in (8.0, 64.0, 1024.0)
        ],
        "mapo_official": [
            {"learning_rate": RATE, "method": {"type": "mapo", "parametrisation": "official", "margin_weight": w}}
            for w in (0.005, 0.02, 0.1)
        ],
    }


GRID = _grid()


@dataclass(frozen=True)
class Cell:
    """One trained LoRA (or the base model, method "base"), measured on one split."""

    task: str
    method: str
    configuration: int
    seed: int
    split: str

    @property
    def run_name(self) -> str:
        """The run that trains it; both splits share it."""
        return f"{self.task}-{self.method}-{self.configuration}-seed{self.seed}"

    @property
    def file_name(self) -> str:
        """Where its result is kept."""
        return f"{self.run_name}-{self.split}.json"


# --- data ------------------------------------------------------------------------------------------------------------


def prepare_task(task: Task, work: Path) -> None:
    """Write a task's pairs, and what the base model draws for its training prompts, twice; nothing is done again."""
    from mapo_core.pairs import PreferencePair, write_pairs
    from mapo_core.sampling import save_image

    folder = work / "tasks" / task.name
    if (folder / "pairs.jsonl").exists():
        return
    drawn = task.pairs()
    shown = drawn[:MISMATCH_PROMPTS]
    for seed in (1, 2):  # two pictures per prompt: the second says how alike the model's own pictures are
        repeats = max(1, 30 // len(shown)) if len(shown) < 30 else 1
        items = [p.caption for p in shown for _ in range(repeats)]
        pictures = draw(None, items, [NOISE_SEED + 1000 * seed + i for i in range(len(items))])
        for i, picture in enumerate(pictures):
            save_image(picture, base_picture(folder, seed, i // repeats, i % repeats))
    pairs: list[PreferencePair] = []
    for i, pair in enumerate(drawn):
        chosen, rejected = (folder / side / f"{i:03d}.png" for side in ("chosen", "rejected"))
        save_image(pair.chosen, chosen)
        own = Image.open(base_picture(folder, 1, i)) if pair.rejected is None else pair.rejected
        save_image(own, rejected)
        pairs.append(PreferencePair(prompt=pair.caption, chosen=chosen.absolute(), rejected=rejected.absolute()))
    write_pairs(folder / "pairs.jsonl", pairs)


def base_picture(folder: Path, seed: int, number: int, repeat: int = 0) -> Path:
    """Where the base model's drawing of training prompt `number` is kept."""
    return folder / f"base_{seed}" / f"{number:03d}-{repeat}.png"


def draw(trained: Any, captions: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
    """A picture per caption, by the LoRA, or by the base model where `trained` is None."""
    from mapo_core.config import ModelConfig
    from mapo_core.families import FAMILIES
    from mapo_core.sampling import sample_images

    family = FAMILIES["sdxl"]
    model = trained.model if trained is not None else family.load(ModelConfig(path="demo"))
    encoded = family.encode_prompts(model, [*captions, ""])
    size = {"width": 64, "height": 64}
    return sample_images(model, family, encoded[:-1], encoded[-1], list(seeds), **size, **SAMPLING)


# --- a cell ----------------------------------------------------------------------------------------------------------


def run_cell(cell: Cell, work: Path) -> dict[str, Any]:
    """Train if its run is not there yet, draw the split's captions, judge, and keep the result."""
    began, load_before = time.time(), os.getloadavg()
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    task = TASKS[cell.task]
    prepare_task(task, work)
    trained, training = None, {}
    if cell.method != "base":
        run, trained_now = train_cell(cell, work)
        training = training_figures(run) | {"memory_before_bytes": memory_before, "trained_in_this_cell": trained_now}
        trained = open_trained(run)
    items = task.items(cell.split)
    pictures = draw(trained, [i.caption for i in items], [NOISE_SEED + i for i in range(len(items))])
    keep_sheet(pictures, items, work / "sheets" / f"{cell.run_name}-{cell.split}.png")
    wanted, right = task.judge(pictures, items)
    result = {
        **asdict(cell),
        "settings": settings_of(cell),
        "steps": task.steps,
        "batch": BATCH,
        "items": [
            {"wanted": round(float(w), 4), "right": round(float(r), 4), "ordinary": i.ordinary}
            for w, r, i in zip(wanted, right, items, strict=True)
        ],
        **training,
        "seconds": round(time.time() - began, 1),
        "load_average": [round(x, 2) for x in (load_before[0], os.getloadavg()[0])],
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("MAPO_COMMIT", ""),
    }
    write_atomic(work / "cells" / cell.file_name, json.dumps(result) + "\n")
    return result


def train_cell(cell: Cell, work: Path) -> tuple[Any, bool]:
    """The cell's finished run, and whether it was trained now; an interrupted run goes on where it was."""
    from mapo_core.trainer import train

    home = work / "home"
    config = cell_config(cell).to_json()
    folder = home / "runs" / cell.run_name
    if folder.exists() and open_run(cell.run_name, home).config.read_text(encoding="utf-8") != config:
        folder.rename(folder.with_name(f".other-settings-{cell.run_name}-{time.time_ns()}"))
    if folder.exists():
        run = open_run(cell.run_name, home)
        if run_status(run).state == "finished":
            return run, False
    else:
        run = create_run(cell.run_name, config, work / "tasks" / cell.task / "pairs.jsonl", home)
    newest = run.latest_checkpoint()
    with EventWriter(run) as events:
        events.emit("run_resumed" if newest else "run_started", checkpoint_step(newest) if newest else 0)
        train(run, events, None)
    return run, True


def cell_config(cell: Cell) -> TrainConfig:
    """The settings of a cell's run."""
    settings = GRID[cell.method][cell.configuration]
    values = demo_values(cell.run_name, settings["method"]["type"], TASKS[cell.task].steps, cell.seed)
    values["method"] = settings["method"]
    values["optimizer"]["learning_rate"] = settings["learning_rate"]
    values["training"]["train_batch_size"] = BATCH
    values["data"]["held_out"] = 0.0 if cell.task == "personalisation" else 0.1
    values["validation"] |= {"every_steps": 0, "draws": 4, "prompts": ["a red circle"], "num_inference_steps": 2}
    values["checkpoint"] = {"every_steps": 50, "keep": 1}
    return build_config(values)


def training_figures(run: Any) -> dict[str, Any]:
    """Seconds per step, memory, errors at the end and held-out measures, from a run's events."""
    events = read_events(run.events)
    steps = [e for e in events if e["type"] == "step"]
    times = [b["time"] - a["time"] for a, b in itertools.pairwise(steps)]
    last = steps[-20:]
    end = events[-1]
    return {
        "seconds_per_step": round(statistics.median(times), 4),
        "fastest_tenth_seconds_per_step": round(statistics.quantiles(times, n=10)[0], 4),
        "peak_memory_bytes": steps[-1]["peak_memory_bytes"],
        "chosen_mse": statistics.mean(e["chosen_mse"] for e in last),
        "rejected_mse": statistics.mean(e["rejected_mse"] for e in last) if "rejected_mse" in last[0] else None,
        "held_out": end.get("held_out"),
        "held_out_base": end.get("held_out_base"),
        "nonfinite_steps": end.get("nonfinite_steps"),
    }


def keep_sheet(pictures: Sequence[Image.Image], items: Sequence[Item], path: Path) -> None:
    """The first pictures of every kind, to be looked at."""
    from mapo_core.sampling import contact_sheet, save_image

    wanted = [n for n, i in enumerate(items) if not i.ordinary][:12]
    ordinary = [n for n, i in enumerate(items) if i.ordinary][:6]
    places = [*wanted[: 12 - len(ordinary)], *ordinary]
    rows = [[pictures[n] for n in places[start : start + 6]] for start in (0, 6)]
    save_image(contact_sheet(rows, tile=96), path)


def score(result: dict[str, Any]) -> float:
    """What configurations are chosen by: wanted and right at once, times what is left of the ordinary captions."""
    asked = [i["wanted"] * i["right"] for i in result["items"] if not i["ordinary"]]
    kept = [i["right"] for i in result["items"] if i["ordinary"]]
    return statistics.mean(asked) * (statistics.mean(kept) if kept else 1.0)


# --- the grid --------------------------------------------------------------------------------------------------------


def plan(work: Path, tasks: Sequence[str], methods: Sequence[str]) -> Iterator[list[Cell]]:
    """Groups of cells that can run at the same time; each group may depend on the results of those before."""
    for task in tasks:
        yield [Cell(task, "base", 0, 0, split) for split in COUNTS]
        yield [Cell(task, m, c, SEEDS[0], "validation") for m in methods for c in range(len(GRID[m]))]
        yield [Cell(task, m, chosen_configuration(work, task, m), s, "test") for m in methods for s in SEEDS]
    for task in tasks:
        if {"mapo_paper", "sft"} <= {*methods}:
            same_rate = [("mapo_paper", c) for c in range(len(GRID["mapo_paper"]))] + [("sft", 1)]
            yield [Cell(task, m, c, s, "validation") for m, c in same_rate for s in SEEDS[1:]]


def chosen_configuration(work: Path, task: str, method: str) -> int:
    """The configuration with the best score on the validation captions, first seed."""
    found = [read_cell(work, Cell(task, method, c, SEEDS[0], "validation")) for c in range(len(GRID[method]))]
    return max(range(len(found)), key=lambda c: score(found[c]))


def read_cell(work: Path, cell: Cell) -> dict[str, Any]:
    """A kept result.

    Raises:
        FileNotFoundError: there is none, or it is of other settings than those of this file.
    """
    path = work / "cells" / cell.file_name
    found = json.loads(path.read_text(encoding="utf-8"))
    wanted = (settings_of(cell), TASKS[cell.task].steps, BATCH)
    if (found["settings"], found["steps"], found["batch"]) != wanted:
        raise FileNotFoundError(f"{path} is of other settings")
    return found


def cell_of(path: Path) -> Cell:
    """The cell that a kept file is of."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Cell(*(found[name] for name in ("task", "method", "configuration", "seed", "split")))


def is_finished(work: Path, cell: Cell) -> bool:
    """Whether there is a result of the present settings."""
    try:
        read_cell(work, cell)
    except FileNotFoundError:
        return False
    return True


def settings_of(cell: Cell) -> dict[str, Any] | None:
    """What a cell tries; None for the base model."""
    return None if cell.method == "base" else GRID[cell.method][cell.configuration]


def take_over(work: Path, kept: Path) -> None:
    """Copy results of an earlier session into the work folder."""
    (work / "cells").mkdir(parents=True, exist_ok=True)
    for path in sorted(kept.glob("*.json")):
        target = work / "cells" / path.name
        if not target.exists():
            write_atomic(target, path.read_bytes())


def run_all(cells: Sequence[Cell], work: Path, jobs: int, stop_at: float) -> bool:
    """Run cells in processes of their own, `jobs` at a time; whether all are there now.

    Each starts as a copy of this one, which has imported everything and computed nothing, so that its largest memory
    use is its own.
    """
    context = multiprocessing.get_context("fork")
    waiting = [c for c in cells if not is_finished(work, c)]
    running: dict[Any, tuple[Any, Cell]] = {}
    failed = False
    while waiting or running:
        names = {c.run_name for _, c in running.values()}
        while waiting and len(running) < jobs and time.time() < stop_at and not failed and has_room(len(running)):
            cell = next((c for c in waiting if c.run_name not in names), None)
            if cell is None:
                break
            waiting.remove(cell)
            names.add(cell.run_name)
            process = context.Process(target=child, args=(cell, work))
            process.start()
            running[process.sentinel] = (process, cell)
        if not running:
            return False
        for sentinel in multiprocessing.connection.wait(list(running), timeout=20):
            process, cell = running.pop(sentinel)
            process.join()
            failed = failed or process.exitcode != 0
    return not failed


def has_room(running: int) -> bool:
    """Whether another cell may start: always one, and more as long as others leave a core free."""
    return running == 0 or os.getloadavg()[0] + 1 <= (os.cpu_count() or 1) + 0.5


def child(cell: Cell, work: Path) -> None:
    """Entry of a cell's process."""
    import torch

    torch.set_num_threads(1)
    try:
        found = run_cell(cell, work)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    pace = found.get("seconds_per_step")
    print(
        f"{time.strftime('%H:%M:%S')} {cell.file_name.removesuffix('.json')}: score {score(found):.3f}, "
        f"{found['seconds']:.0f} s" + (f", {pace:.3f} s/step" if pace else ""),
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/reference_mismatch"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "reference_mismatch")
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, one thread each")
    parser.add_argument("--tasks", nargs="+", default=list(ORDER), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(GRID), choices=list(GRID))
    parser.add_argument("--minutes", type=float, default=1e6, help="start no new cell after this long")
    parser.add_argument("--report", action="store_true", help="write table and plots from the cells that are there")
    args = parser.parse_args()
    work: Path = args.work.absolute()
    take_over(work, args.out)
    if args.report:
        from mismatch_report import write_report

        write_report(work, args.out)
        return
    os.environ["MAPO_HOME"] = str(work / "home")
    os.environ.setdefault("MAPO_COMMIT", commit())
    import_everything()
    stop_at = time.time() + 60 * args.minutes
    print(f"{platform.machine()}, {os.cpu_count()} cores, {args.jobs} at a time, {PAIRS} pairs", flush=True)
    for cells in plan(work, args.tasks, args.methods):
        if not run_all(cells, work, args.jobs, stop_at):
            sys.exit("stopped: the same command goes on from here")
    print("the grid is complete", flush=True)


def import_everything() -> None:
    """What every cell needs, so that its process need not load it."""
    import bitsandbytes  # noqa: F401
    import diffusers
    import peft  # noqa: F401
    import torch

    import mapo_core.cache
    import mapo_core.families.sdxl
    import mapo_core.trainer  # noqa: F401

    torch.set_num_threads(1)
    assert diffusers.StableDiffusionXLPipeline  # loaded when it is first asked for


def commit() -> str:
    """The source's commit, if git knows it."""
    done = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
