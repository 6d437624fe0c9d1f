"""Whether each switch for speed makes a step faster here: the time of a step with it over that without it.

    python benchmarks/switches.py --threads 1                  # a CPU, reduced SDXL
    python benchmarks/switches.py --size full --batch 2        # an NVIDIA GPU; writes 7 GB to --work

A switch is measured alone: two sessions that differ in it and in nothing else take the trainer's own step by turns,
with and without, and a round's ratio is the one over the other. What a device cannot do is said with the reason.
Weights and pictures are random, which changes nothing about the time.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from step_measures import alternate, own_time, synchronize  # noqa: E402
from step_models import SIZES, write_model, write_pairs  # noqa: E402
from train_step import describe, share_weights  # noqa: E402

Values = dict[str, dict[str, Any]]
Step = Callable[[], object]


@dataclass(frozen=True)
class Switch:
    """A switch and what it needs to be seen.

    Attributes:
        on, off: groups of settings.
        common: of both.
        passes: batches per step.
        cuda: there only; elsewhere there is nothing to switch.
        wall: it hides waiting, so the time that passes counts and not the processor's.
        own_weights: the two sessions cannot share their frozen weights.
    """

    on: Values
    off: Values
    common: Values = field(default_factory=dict)
    passes: int = 1
    cuda: bool = False
    wall: bool = False
    own_weights: bool = False


def _memory(name: str, **how: Any) -> Switch:
    return Switch({"memory": {name: True}}, {"memory": {name: False}}, **how)


ADAMW: Values = {"optimizer": {"type": "adamw"}}
SWITCHES = {
    "memory.prefetch": _memory("prefetch", passes=4, wall=True),
    "memory.channels_last": _memory("channels_last", own_weights=True),
    "memory.fused_optimizer": _memory("fused_optimizer", common=ADAMW),
    "memory.compile": _memory("compile"),
    "memory.tf32": _memory("tf32", common={"training": {"precision": "fp32"}}, cuda=True),
    "pinned memory": Switch({}, {}, cuda=True, wall=True),
}


def main() -> None:
    options = parse()
    os.environ["MAPO_HOME"] = str(options.work / "home")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    found: dict[str, Any] = {}
    for name in options.switches:
        found[name] = measure(name, options, device)
        print(row(name, found[name]), file=sys.stderr, flush=True)
        gc.collect()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/switches.py --size {options.size} --rounds {options.rounds}"
        + (f" --threads {options.threads}" if options.threads else "")
        + (f" --batch {options.batch}" if options.batch != 1 else ""),
        "machine": describe(device),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "switches": found,
    }
    print(table(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="reduced")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=1, help="pairs in a forward pass")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--switches", nargs="+", choices=SWITCHES, default=list(SWITCHES))
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "train_step", help="model, pictures, runs")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Ratios of a switch, or why there are none."""
    from mapo_core import MapoError

    switch = SWITCHES[name]
    if switch.cuda and device.type != "cuda":
        return {"impossible": "nothing to switch without CUDA"}
    try:
        steps = {on: build(name, on, options, device) for on in (True, False)}
    except MapoError as error:
        return {"impossible": str(error).split(". ")[0]}
    if not switch.own_weights:
        share_weights(steps[False][0], steps[True][0])
    wall = switch.wall or not own_time(device)
    times = (wall_times if wall else alternate)(
        {str(on): step for on, (_, step) in steps.items()}, options.rounds, device
    )
    ratios = [a / b for a, b in zip(times["True"], times["False"], strict=True)]
    return {
        "ratios": ratios,
        "min": min(ratios),
        "median": statistics.median(ratios),
        "max": max(ratios),
        "seconds_without": statistics.median(times["False"]),
        "clock": "wall" if wall else "process",
    }


def wall_times(arms: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """As `alternate`, by the time that passes; the order changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name in arms if number % 2 else reversed(list(arms)):
            synchronize(device)
            start = time.perf_counter()
            arms[name]()
            synchronize(device)
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def build(name: str, on: bool, options: argparse.Namespace, device: torch.device) -> tuple[Any, Step]:
    """The denoiser of a session with the switch on or off, and the trainer's step on it."""
    from accelerate.state import AcceleratorState

    from mapo_core import build_config, merge_settings
    from mapo_core.data_order import step_groups
    from mapo_core.runs import create_run
    from mapo_core.session import prepare
    from mapo_core.trainer import train_step

    switch, side = SWITCHES[name], SIZES[options.size].resolution
    model = write_model(options.work / f"model-{options.size}", options.size)
    pairs = write_pairs(options.work / "pictures", side, max(8, options.batch * switch.passes))
    values = merge_settings(
        {
            "name": f"switch-{name.replace('.', '-')}-{on}",
            "model": {"path": str(model)},
            "data": {"pairs": "pairs.jsonl", "resolution": side, "held_out": 0.0},
            "training": {
                "steps": 1_000_000,
                "train_batch_size": options.batch,
                "gradient_accumulation_steps": switch.passes,
                "device": str(device),
                "gradient_checkpointing": False,
            },
            "memory": {"plan": "manual", "preflight": "off", "prefetch": False},
        },
        switch.common,
        switch.on if on else switch.off,
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    session = prepare(create_run(values["name"], build_config(values).to_json(), pairs), None, None)
    session.model.vae = None  # the timed steps have no pictures to draw
    buckets = [session.pairs.bucket(i) for i in session.train_indices]
    groups = step_groups(buckets, options.batch * switch.passes, session.config.seed)

    def step() -> object:
        session.step += 1
        with as_switched(name, on):
            return train_step(session, next(groups), buckets)

    return session.model.unet, step


class as_switched:
    """What is switched for the whole process, for one step; torch's TF32, and pinned memory, which has no setting."""

    def __init__(self, name: str, on: bool) -> None:
        self.name, self.on = name, on

    def __enter__(self) -> None:
        from mapo_core import batch

        self.before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, batch._move
        if self.name == "memory.tf32":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.on
        if self.name == "pinned memory" and not self.on:
            batch._move = lambda tensor, device: tensor.to(device)

    def __exit__(self, *_: object) -> None:
        from mapo_core import batch

        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, batch._move = self.before


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = ["| switch | time with / without | smallest | largest | clock |", "|---|---|---|---|---|"]
    return "\n".join(lines + [row(name, found) for name, found in result["switches"].items()])


def row(name: str, found: dict[str, Any]) -> str:
    """One switch."""
    if "impossible" in found:
        return f"| `{name}` | not measured: {found['impossible']} | - | - | - |"
    return f"| `{name}` | {found['median']:.3f} | {found['min']:.3f} | {found['max']:.3f} | {found['clock']} |"


if __name__ == "__main__":
    main()
