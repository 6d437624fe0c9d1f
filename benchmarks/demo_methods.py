"""The methods on the demo model: style learned against fidelity kept, on 100 held-out captions.

    python benchmarks/demo_methods.py --out docs/benchmarks

Each method gets the best of three configurations, chosen with one seed; then every method is run with three seeds.
The pairs, captions and noise are the same for all. Finished runs are kept in --work and not repeated, those in
--out/demo_methods.json are taken over, so an interrupted benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mapo_core import build_config  # noqa: E402
from mapo_core.demo.run import create_demo_run, demo_values, measure_demo  # noqa: E402
from mapo_core.runs import open_run, read_events, run_status, start_run  # noqa: E402

STYLE = "cartoon"
PAPER = {"type": "mapo", "parametrisation": "paper"}
OFFICIAL = {"type": "mapo", "parametrisation": "official"}
GRID: dict[str, list[tuple[float, dict[str, Any]]]] = {
    "mapo_paper": [(3e-3, {**PAPER, "beta": beta}) for beta in (8.0, 64.0, 1024.0)],
    "mapo_official": [
        (rate, {**OFFICIAL, "margin_weight": w}) for rate, w in ((1e-3, 0.02), (3e-3, 0.02), (3e-3, 0.005))
    ],
    "sft": [(rate, {"type": "sft"}) for rate in (3e-4, 1e-3, 3e-3)],
    "diffusion_dpo": [(rate, {"type": "diffusion_dpo"}) for rate in (1e-4, 3e-4, 1e-3)],
}
"""Configurations by method: learning rate and settings of the method; what is not said is the demo's."""
SEEDS = (0, 1, 2)


def named(method: str, configuration: int, seed: int, steps: int | None) -> str:
    """A run's name: what was trained."""
    rate, settings = GRID[method][configuration]
    own = "".join(f"-{k}{v:g}" for k, v in settings.items() if isinstance(v, float))
    return f"{method}{own}-lr{rate:g}-seed{seed}" + (f"-{steps}" if steps else "")


def take_over(out: Path, work: Path) -> None:
    """Runs of a record that was kept need not be trained again."""
    kept = out / "demo_methods.json"
    if not kept.exists():
        return
    record = json.loads(kept.read_text(encoding="utf-8"))
    for found in [*record["runs"], *record["tried"]]:
        path = work / f"{found['name']}.json"
        if not path.exists():
            path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def run_one(method: str, configuration: int, seed: int, steps: int | None, work: Path) -> dict[str, Any]:
    """Train and measure one run, or read what it gave the last time."""
    name = named(method, configuration, seed, steps)
    result = work / f"{name}.json"
    if result.exists():
        return json.loads(result.read_text(encoding="utf-8"))
    rate, settings = GRID[method][configuration]
    values = demo_values(name, settings["type"], steps, seed)
    values["method"] = settings
    values["optimizer"]["learning_rate"] = rate
    values["validation"]["every_steps"] = 0
    values["checkpoint"]["every_steps"] = 0
    config = build_config(values)
    home = work / "home"
    run = open_run(name, home) if (home / "runs" / name).exists() else create_demo_run(config, STYLE, home)
    if run_status(run).state != "finished":
        status = start_run(run).wait()
        if status.state != "finished":
            raise SystemExit(f"{name}: {status.message}; see {run.log}")
    before, after, _ = measure_demo(run, STYLE)
    events = [e for e in read_events(run.events) if e["type"] == "step"]
    end = read_events(run.events)[-1]
    found = {
        "name": name,
        "method": method,
        "settings": settings,
        "learning_rate": rate,
        "seed": seed,
        "steps": config.training.steps,
        "date": time.strftime("%Y-%m-%d"),
        "seconds_per_step": statistics.median(e["seconds_per_step"] for e in events),
        "before": asdict(before),
        "after": asdict(after),
        "held_out": end["held_out"],
        "held_out_base": end["held_out_base"],
    }
    result.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(name, json.dumps(found["after"]), f"{found['seconds_per_step']:.3f} s/step", flush=True)
    return found


def rank(found: dict[str, Any]) -> float:
    """What the better configuration is better at: style, less any loss of fidelity beyond 0.10."""
    lost = [max(0.0, found["before"][k] - found["after"][k] - 0.10) for k in ("objects", "colours")]
    return found["after"]["style"] - sum(lost)


def row(runs: list[dict[str, Any]]) -> str:
    """Mean and range over the seeds, as a line of the table."""

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    first = runs[0]
    cells = [
        first["method"],
        configuration_of(first),
        cell([r["after"]["style"] for r in runs]),
        cell([r["after"]["objects"] - r["before"]["objects"] for r in runs]),
        cell([r["after"]["colours"] - r["before"]["colours"] for r in runs]),
        cell([r["held_out"]["accuracy"] for r in runs]),
        f"{statistics.median(r['seconds_per_step'] for r in runs):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def configuration_of(found: dict[str, Any]) -> str:
    """Learning rate and the method's own settings in a few words."""
    own = "".join(f", {k} {v:g}" for k, v in found["settings"].items() if isinstance(v, float))
    return f"rate {found['learning_rate']:g}{own}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo_methods"))
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--steps", type=int, help="training steps; default: the demo's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; the cores are shared among them")
    parser.add_argument("--methods", nargs="+", default=list(GRID), choices=list(GRID))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    take_over(args.out, args.work)
    began = time.time()
    os.environ["MAPO_HOME"] = str(args.work / "home")
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with ThreadPoolExecutor(args.jobs) as pool:

        def start(method: str, configuration: int, seed: int) -> Future[dict[str, Any]]:
            return pool.submit(run_one, method, configuration, seed, args.steps, args.work)

        first = {m: [start(m, c, SEEDS[0]) for c in range(len(GRID[m]))] for m in args.methods}
        chosen: dict[str, list[dict[str, Any]]] = {}
        rest: dict[str, list[Future[dict[str, Any]]]] = {}
        for method, futures in first.items():
            best = max(range(len(futures)), key=lambda i, f=futures: rank(f[i].result()))
            chosen[method] = [futures[best].result()]
            rest[method] = [start(method, best, seed) for seed in SEEDS[1:]]
        for method, futures in rest.items():
            chosen[method] += [f.result() for f in futures]
    tried = [f.result() for futures in first.values() for f in futures]
    base = next(iter(chosen.values()))[0]["before"]
    lines = [
        "| method | configuration | style score | objects, change | colours, change | held-out accuracy | s/step |",
        "|---|---|---|---|---|---|---|",
        *(row(runs) for runs in chosen.values()),
    ]
    table = "\n".join(lines)
    print(table)
    print(f"base: {base}; {time.time() - began:.0f} s for what was not there yet")
    record = {
        "command": " ".join(["python benchmarks/demo_methods.py", *sys.argv[1:]]),
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "date": time.strftime("%Y-%m-%d"),
        "style": STYLE,
        "base": base,
        "runs": [r for runs in chosen.values() for r in runs],
        "tried": tried,
    }
    (args.out / "demo_methods.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "demo_methods.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
