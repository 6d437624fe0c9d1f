"""How long a face takes to show a long run: the first time, and again when a few steps were added.

`python benchmarks/event_reading.py [steps]` writes a run of that many steps (default 100 000) into a temporary folder.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mapo_core.runs import RunDir, create_run, run_history, run_status

FIELDS = ("loss", "chosen_mse", "rejected_mse", "rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate")


def lines(first: int, count: int) -> str:
    """Step events as the trainer writes them."""
    told = []
    for step in range(first, first + count):
        numbers = {name: random.random() for name in FIELDS}
        tail = {"seconds_left": 9.5, "seconds_per_step": 0.5, "peak_memory_bytes": 2**33}
        told.append(json.dumps({"v": 1, "time": 1e9 + step, "type": "step", "step": step, **numbers, **tail}))
    return "\n".join(told) + "\n"


def show(run: RunDir) -> float:
    """Seconds to get what a page shows of a run: its status and its curves."""
    begin = time.perf_counter()
    run_status(run)
    run_history(run, 600)
    return time.perf_counter() - begin


def main() -> None:
    """Write, look, add, look again."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    with tempfile.TemporaryDirectory() as folder:
        run = create_run("long", "{}", "", Path(folder))
        with run.events.open("w") as file:
            file.write('{"v": 1, "time": 1.0, "type": "run_started", "step": 0, "pid": 1, "pid_started": 0.5}\n')
            for first in range(1, steps + 1, 1000):
                file.write(lines(first, 1000))
        print(f"{steps} steps, {run.events.stat().st_size / 1e6:.0f} MB")
        print(f"first look {show(run):.3f} s")
        for n in range(3):
            with run.events.open("a") as file:
                file.write(lines(steps + 1 + 10 * n, 10))
            print(f"10 steps later {show(run):.3f} s")
        print(f"peak memory of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
