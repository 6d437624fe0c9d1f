"""The methods on the demo model: style learned against fidelity kept, on 100 held-out captions.

    python benchmarks/demo_methods.py --out docs/benchmarks

Each baseline gets the better of three learning rates, chosen with one seed; then every method is run with three seeds.
The pairs, captions and noise are the same for all. Finished runs are kept in --work and not repeated, so an
interrupted benchmark goes on where it was.
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
GRID = {"mapo": (1e-3, 3e-3), "sft": (3e-4, 1e-3, 3e-3), "diffusion_dpo": (1e-4, 3e-4, 1e-3)}
SEEDS = (0, 1, 2)


def run_one(method: str, learning_rate: float | None, seed: int, steps: int | None, work: Path) -> dict[str, Any]:
    """Train and measure one run, or read what it gave the last time."""
    rate = "default" if learning_rate is None else f"{learning_rate:g}"
    name = f"{method}-lr{rate}-seed{seed}" + (f"-{steps}" if steps else "")
    result = work / f"{name}.json"
    if result.exists():
        return json.loads(result.read_text())
    values = demo_values(name, method, steps, seed)
    if learning_rate is not None:
        values["optimizer"]["learning_rate"] = learning_rate
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
        "method": method,
        "learning_rate": config.optimizer.learning_rate,
        "seed": seed,
        "steps": config.training.steps,
        "seconds_per_step": statistics.median(e["seconds_per_step"] for e in events),
        "before": asdict(before),
        "after": asdict(after),
        "held_out": end["held_out"],
        "held_out_base": end["held_out_base"],
        "run": str(run.path),
    }
    result.write_text(json.dumps(found, indent=2) + "\n")
    print(name, json.dumps(found["after"]), f"{found['seconds_per_step']:.3f} s/step", flush=True)
    return found


def rank(found: dict[str, Any]) -> float:
    """What the better learning rate is better at: style, less any loss of fidelity beyond 0.10."""
    lost = [max(0.0, found["before"][k] - found["after"][k] - 0.10) for k in ("objects", "colours")]
    return found["after"]["style"] - sum(lost)


def row(runs: list[dict[str, Any]]) -> str:
    """Mean and range over the seeds, as a line of the table."""

    def cell(values: list[float]) -> str:
        return f"{statistics.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"

    first = runs[0]
    cells = [
        first["method"],
        f"{first['learning_rate']:g}",
        cell([r["after"]["style"] for r in runs]),
        cell([r["after"]["objects"] - r["before"]["objects"] for r in runs]),
        cell([r["after"]["colours"] - r["before"]["colours"] for r in runs]),
        cell([r["held_out"]["accuracy"] for r in runs]),
        f"{statistics.median(r['seconds_per_step'] for r in runs):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


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
    began = time.time()
    os.environ["MAPO_HOME"] = str(args.work / "home")
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with ThreadPoolExecutor(args.jobs) as pool:

        def start(method: str, rate: float | None, seed: int) -> Future[dict[str, Any]]:
            return pool.submit(run_one, method, rate, seed, args.steps, args.work)

        first = {m: [start(m, rate, SEEDS[0]) for rate in GRID[m]] for m in args.methods}
        chosen: dict[str, list[dict[str, Any]]] = {}
        rest: dict[str, list[Future[dict[str, Any]]]] = {}
        for method, futures in first.items():
            best = max(range(len(futures)), key=lambda i, f=futures: rank(f[i].result()))
            chosen[method] = [futures[best].result()]
            rest[method] = [start(method, GRID[method][best], seed) for seed in SEEDS[1:]]
        for method, futures in rest.items():
            chosen[method] += [f.result() for f in futures]
    tried = [f.result() for futures in first.values() for f in futures]
    base = next(iter(chosen.values()))[0]["before"]
    lines = [
        "| method | learning rate | style score | objects, change | colours, change | held-out accuracy | s/step |",
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
        "runs": [{k: v for k, v in r.items() if k != "run"} for runs in chosen.values() for r in runs],
        "tried": [{k: v for k, v in r.items() if k != "run"} for r in tried],
    }
    (args.out / "demo_methods.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "demo_methods.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
