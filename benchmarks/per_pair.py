"""How well the per-pair view finds pairs that were turned round on purpose, on the demo model.

    python benchmarks/per_pair.py        # some minutes on a CPU

Pairs of one scene each, cartoon before plain; of those that are trained on, some have their images changed round. A
pair is "found" where its class is "resisted" or "harmful". Precision: share of the found that were turned; recall:
share of the turned that are found. The last column is the share of the right training pairs that are "learned". Rows
with "no" are the view without weighing timesteps by the base model's error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PAIRS, HELD_OUT, TURNED = 48, 12, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 90])
    options = parser.parse_args()
    print("| steps | timesteps weighed | seed | found | of the turned | precision | recall | right pairs learned |")
    print("|---|---|---|---|---|---|---|---|")
    for steps, seed in itertools.product(options.steps, range(options.seeds)):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MAPO_HOME"] = str(Path(folder) / "home")
            run, turned = trained(Path(folder), seed, steps)
            for weighed in (True, False):
                print(row(run, turned, seed, steps, weighed), flush=True)


def trained(folder: Path, seed: int, steps: int) -> tuple[Any, set[int]]:
    """A finished run and the pairs that were turned round."""
    from accelerate.state import AcceleratorState

    from mapo_core import build_config
    from mapo_core.demo.scenes import render, scenes
    from mapo_core.runs import EventWriter, create_run
    from mapo_core.trainer import train

    turned = set(random.Random(seed).sample(range(PAIRS - HELD_OUT), TURNED))
    records = []
    for i, scene in enumerate(itertools.islice(scenes(7 + seed, held_out=False), PAIRS)):
        record: dict[str, Any] = {"prompt": scene.caption, "held_out": i >= PAIRS - HELD_OUT}
        styles = ("plain", "cartoon") if i in turned else ("cartoon", "plain")
        for side, style in zip(("chosen", "rejected"), styles, strict=True):
            record[side] = str(folder / f"{side}-{i}.png")
            render(scene, style, 64).save(record[side])
        records.append(json.dumps(record))
    values = {
        "name": f"turned-{seed}-{steps}",
        "seed": seed,
        "model": {"path": "demo"},
        "data": {"pairs": "pairs.jsonl", "bucket": False},
        "method": {"type": "mapo", "margin_weight": 0.1},
        "adapter": {"rank": 8, "targets": ["attention"]},
        "optimizer": {"type": "adamw", "learning_rate": 2e-3, "warmup_steps": 0},
        "training": {"steps": steps, "train_batch_size": 4, "gradient_accumulation_steps": 1, "device": "cpu"},
        "validation": {"every_steps": 0, "draws": 2, "sample_every_steps": 0, "num_inference_steps": 1},
        "checkpoint": {"every_steps": 0},
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    run = create_run(values["name"], build_config(values).to_json(), "\n".join(records) + "\n")
    with EventWriter(run) as events:
        events.emit("run_started", 0)
        train(run, events, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    return run, turned


def row(run: Any, turned: set[int], seed: int, steps: int, weighed: bool) -> str:
    """The figures of one view of a run."""
    from mapo_core import inspect_pairs

    real = inspect_pairs.level_scales
    if not weighed:
        inspect_pairs.level_scales = lambda errors: [1.0] * errors.draws
    try:
        found = inspect_pairs.inspect_run(run, influence_pairs=PAIRS)
    finally:
        inspect_pairs.level_scales = real
    own = {p.index: p.verdict for p in found.pairs if not p.held_out}
    suspects = {i for i, verdict in own.items() if verdict in ("resisted", "harmful")}
    hits = len(suspects & turned)
    right = [verdict for i, verdict in own.items() if i not in turned]
    precision = f"{hits / len(suspects):.2f}" if suspects else "-"
    return (
        f"| {steps} | {'yes' if weighed else 'no'} | {seed} | {len(suspects)} | {hits} of {len(turned)} | {precision} "
        f"| {hits / len(turned):.2f} | {right.count('learned') / len(right):.2f} |"
    )


if __name__ == "__main__":
    main()
