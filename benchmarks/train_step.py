"""One training step of the engine against the published recipe, SFT and Diffusion-DPO: speed and memory.

    python benchmarks/train_step.py --size reduced --rounds 12 --memory          # a CPU
    python benchmarks/train_step.py --size full --rounds 20 --memory --find-batch # an NVIDIA GPU; writes 7 GB to --work
    python benchmarks/train_step.py --report

Weights and pictures are random, which changes nothing about the time. The engine's steps are `trainer.train_step` of a
session that `session.prepare` has made; the recipe is benchmarks/step_recipe.py. All arms run in one process by turns,
A B C A B C ..., and what is compared are ratios within a round. Memory is measured in a process per arm.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from step_measures import (  # noqa: E402
    LiveTensors,
    Operations,
    alternate,
    count_operations,
    matmul_rate,
    own_time,
    process_peak_bytes,
    ratio,
    reset_process_peak,
    synchronize,
)
from step_models import SIZES, write_model, write_pairs  # noqa: E402
from step_recipe import build_recipe  # noqa: E402
from step_report import write_report  # noqa: E402

PAIRS = 8
OUT = ROOT / "docs" / "benchmarks"


@dataclass(frozen=True)
class Arm:
    """One contestant.

    Attributes:
        title: for the table.
        method: "mapo", "sft" or "diffusion_dpo".
        recipe: the published recipe instead of the engine.
        checkpointing: gradient checkpointing; None: whatever the engine does by itself, with its memory plan.
        settings: further groups of the engine's settings.
        tf32: also for matrix products; torch's default has it for convolutions only.
        cuda: only there.
    """

    title: str
    method: str = "mapo"
    recipe: bool = False
    checkpointing: bool | None = False
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    tf32: bool = False
    cuda: bool = False


SPLIT = {"memory": {"split_pairs": "on"}}
ARMS = {
    "mapo-default": Arm("engine: MaPO, all settings left alone", checkpointing=None),
    "mapo": Arm("engine: MaPO"),
    "mapo-checkpointing": Arm("engine: MaPO, checkpointing", checkpointing=True),
    "mapo-split": Arm("engine: MaPO, split pairs", settings=SPLIT),
    "mapo-split-checkpointing": Arm("engine: MaPO, split pairs, checkpointing", checkpointing=True, settings=SPLIT),
    "sft": Arm("engine: SFT", "sft"),
    "dpo": Arm("engine: Diffusion-DPO", "diffusion_dpo"),
    "mapo-autocast": Arm("engine: MaPO, autocast", settings={"training": {"autocast": True}}, cuda=True),
    "mapo-8gb": Arm("engine: MaPO, plan 8GB", settings={"memory": {"plan": "8GB"}}, cuda=True),
    "mapo-nf4": Arm("engine: MaPO, plan 6GB", settings={"memory": {"plan": "6GB"}}, cuda=True),
    "recipe": Arm("recipe: MaPO, as published", recipe=True, checkpointing=True),
    "recipe-plain": Arm("recipe: MaPO, no checkpointing", recipe=True),
    "recipe-tf32": Arm("recipe: MaPO, TF32 products", recipe=True, checkpointing=True, tf32=True, cuda=True),
    "recipe-sft": Arm("recipe: SFT", "sft", recipe=True, checkpointing=True),
    "recipe-dpo": Arm("recipe: Diffusion-DPO", "diffusion_dpo", recipe=True, checkpointing=True),
}
RATIOS = {  # name: (how many times the time of the second arm's step is that of the first)
    "engine, all settings left alone, against the recipe as published": ("recipe", "mapo-default"),
    "engine against the recipe as published": ("recipe", "mapo"),
    "engine with checkpointing against the recipe as published": ("recipe", "mapo-checkpointing"),
    "engine against the recipe without checkpointing": ("recipe-plain", "mapo"),
    "engine against the recipe with TF32 products": ("recipe-tf32", "mapo"),
    "SFT: engine against the recipe": ("recipe-sft", "sft"),
    "Diffusion-DPO: engine against the recipe": ("recipe-dpo", "dpo"),
    "MaPO's time as a share of Diffusion-DPO's, engine": ("mapo", "dpo"),
    "time of split pairs against joint ones": ("mapo-split", "mapo"),
    "time with checkpointing against without, engine": ("mapo-checkpointing", "mapo"),
    "time with autocast against without, engine": ("mapo-autocast", "mapo"),
    "time with split pairs and checkpointing against neither": ("mapo-split-checkpointing", "mapo"),
}


def main() -> None:
    options = parse()
    if options.report:
        write_report(options.out, ARMS, RATIOS)
        return
    os.environ["MAPO_HOME"] = str(options.work / "home")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.one:
        print(json.dumps(measure_memory(options.one, options, device)))
        return
    names = [n for n in options.arms if device.type == "cuda" or not ARMS[n].cuda]
    file = options.out / f"train_step_{options.size}_{device.type}.json"
    model, _ = prepare_files(options)
    # Without rounds, memory is added to the times that are there.
    result = timed(names, model, options, device) if options.rounds else json.loads(file.read_text(encoding="utf-8"))
    for name in names:
        if options.memory:
            result["arms"].setdefault(name, {})["memory"] = in_own_process(name, options, options.batch)
        if options.find_batch:
            result["arms"].setdefault(name, {})["largest_batch"] = largest_batch(name, options)
            result["memory_limit_gb"] = options.memory_limit if device.type == "cpu" else None
    options.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    write_report(options.out, ARMS, RATIOS)


def timed(names: list[str], model: Path, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Times of all arms, and what they were measured with."""
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    rates = [matmul_rate(device, precision)]
    times = compare(names, options, device)
    rates.append(matmul_rate(device, precision))
    operations = count_operations(options.size) if not options.model else None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python benchmarks/train_step.py --size {options.size} --rounds {options.rounds}",
        "machine": describe(device),
        "size": options.size,
        "device": device.type,
        "model": options.model or model.name,
        "resolution": SIZES[options.size].resolution,
        "batch": options.batch,
        "precision": str(precision).removeprefix("torch."),
        "clock": "process" if own_time(device) else "wall",
        "matmul_per_s": max(rates),
        "operations": operations.as_dict() if operations else None,
        "operations_full": count_operations("full").as_dict() if options.size == "reduced" else None,
        "arms": {n: summary(n, times[n], options.batch, operations, max(rates)) for n in names},
        "ratios": {k: ratio(times[a], times[b]) for k, (a, b) in RATIOS.items() if a in times and b in times},
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="reduced")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="a real SDXL (diffusers folder) instead of random weights; with --size full")
    parser.add_argument("--batch", type=int, default=1, help="pairs per step")
    parser.add_argument("--rounds", type=int, default=12, help="0: only add memory to what is in --out")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--memory", action="store_true", help="also measure memory, a process per arm")
    parser.add_argument("--find-batch", action="store_true", help="also search the largest batch that fits")
    parser.add_argument("--memory-limit", type=float, default=4.0, help="GB that a process may take, on the CPU")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "train_step", help="models, pictures, runs")
    parser.add_argument("--out", type=Path, default=OUT, help="where results and the report go")
    parser.add_argument("--report", action="store_true", help="only write the report of the results in --out")
    parser.add_argument("--one", choices=ARMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def prepare_files(options: argparse.Namespace) -> tuple[Path, str]:
    """The model's folder and the pairs.jsonl's text."""
    model = Path(options.model) if options.model else write_model(options.work / f"model-{options.size}", options.size)
    return model, write_pairs(options.work / "pictures", SIZES[options.size].resolution, max(PAIRS, options.batch))


# --- the arms ---------------------------------------------------------------------------------------------------------


def compare(names: list[str], options: argparse.Namespace, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of every arm and round."""
    first: dict[bool, Any] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name in names:
        unet, step = build(name, options, device)
        share_weights(first.setdefault(ARMS[name].recipe, unet), unet)
        steps[name] = with_tf32(step, ARMS[name].tf32)
        print(f"ready: {ARMS[name].title}", file=sys.stderr, flush=True)
    return alternate(steps, options.rounds, device)


def build(name: str, options: argparse.Namespace, device: torch.device) -> tuple[Any, Callable[[], object]]:
    """An arm's denoiser and its step."""
    arm = ARMS[name]
    model, pairs = prepare_files(options)
    if not arm.recipe:
        return engine_step(arm, name, model, pairs, options, device)
    recipe = build_recipe(
        model,
        [json.loads(line) for line in pairs.splitlines()],
        method=arm.method,
        device=device,
        batch_size=options.batch,
        resolution=SIZES[options.size].resolution,
        checkpointing=bool(arm.checkpointing),
    )
    return recipe.unet, recipe.step


def engine_step(
    arm: Arm, name: str, model: Path, pairs: str, options: argparse.Namespace, device: torch.device
) -> tuple[Any, Callable[[], object]]:
    """A run of the engine up to where its loop begins, and the loop's step."""
    from accelerate.state import AcceleratorState

    from mapo_core import build_config
    from mapo_core.data_order import step_groups
    from mapo_core.runs import create_run
    from mapo_core.session import prepare
    from mapo_core.trainer import train_step

    values: dict[str, Any] = {
        "name": f"step-{name}",
        "model": {"path": str(model)},
        "data": {"pairs": "pairs.jsonl", "resolution": SIZES[options.size].resolution, "held_out": 0.0},
        "method": {"type": arm.method},
        "training": {
            "steps": 1_000_000,
            "train_batch_size": options.batch,
            "gradient_accumulation_steps": 1,
            "device": str(device),
            "gradient_checkpointing": arm.checkpointing,
        },
    }
    if arm.checkpointing is not None:
        values["memory"] = {"plan": "manual", "preflight": "off"}  # what the arm says and nothing else
    for group, fields in arm.settings.items():
        values[group] = {**values.get(group, {}), **fields}
    AcceleratorState._reset_state(reset_partial_state=True)
    session = prepare(create_run(values["name"], build_config(values).to_json(), pairs), None, None)
    if arm.checkpointing is None:
        print(f"{name}: the plan is {session.plan}", file=sys.stderr, flush=True)
    session.model.vae = None  # the timed steps have no pictures to draw
    buckets = [session.pairs.entries[i].bucket for i in session.train_indices]
    groups = step_groups(buckets, options.batch, session.config.seed)

    def step() -> object:
        session.step += 1
        return train_step(session, next(groups), buckets)

    return session.model.unet, step


def share_weights(source: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let two denoisers of the same frozen weights keep them once."""
    if source is other:
        return
    weights = dict(source.named_parameters())
    for name, parameter in other.named_parameters():
        twin = weights.get(name)
        if (
            twin is not None
            and not parameter.requires_grad
            and (twin.shape, twin.dtype, type(twin)) == (parameter.shape, parameter.dtype, type(parameter))
        ):
            parameter.data = twin.data


def with_tf32(step: Callable[[], object], on: bool) -> Callable[[], object]:
    """The step with TF32 in matrix products, where it is on."""
    if not on:
        return step

    def inner() -> object:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return step()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return inner


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads, {torch.__version__}"


def summary(name: str, times: list[float], batch: int, operations: Operations | None, rate: float) -> dict[str, Any]:
    """Medians of an arm; the share counts only the operations that the method needs, none done twice."""
    if not times:
        return {}
    seconds = statistics.median(times)
    found: dict[str, Any] = {"seconds": times, "median_s": seconds, "pairs_per_s": batch / seconds}
    if operations:
        needed = pair_operations(ARMS[name], operations)
        found |= {"operations_per_pair": needed, "share_of_matmul": batch * needed / seconds / rate}
    return found


def pair_operations(arm: Arm, operations: Operations) -> int:
    """What a pair needs: forward and backward, the reference's forward, and in the recipe both kinds of encoder."""
    images = 1 if arm.method == "sft" else 2
    needed = images * (operations.unet_forward + operations.unet_backward)
    needed += images * operations.unet_forward if arm.method == "diffusion_dpo" else 0
    return needed + (images * operations.vae + operations.text if arm.recipe else 0)


# --- memory -----------------------------------------------------------------------------------------------------------


def measure_memory(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Peaks of one arm alone: of everything before the first step, of the steps, and of a step without the weights."""
    cuda = device.type == "cuda"
    _, step = build(name, options, device)
    found: dict[str, Any] = {}
    if cuda:
        found["peak_before_bytes"] = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        resting = torch.cuda.memory_allocated(device)
    else:
        found["peak_before_bytes"] = process_peak_bytes()
        reset_process_peak()
    for _ in range(3 if cuda else 1):
        step()
        synchronize(device)
    if cuda:
        peak = torch.cuda.max_memory_allocated(device)
        return {**found, "peak_step_bytes": peak, "peak_live_bytes": peak - resting}
    found["peak_step_bytes"] = process_peak_bytes()
    with LiveTensors() as live:
        step()
    return {**found, "peak_live_bytes": live.peak}


def in_own_process(name: str, options: argparse.Namespace, batch: int) -> dict[str, Any] | None:
    """`measure_memory` in a process of its own; None where the memory does not suffice."""
    command = [sys.executable, __file__, "--one", name, "--size", options.size, "--device", options.device]
    command += ["--batch", str(batch), "--work", str(options.work)]
    command += ["--model", options.model] if options.model else []
    command += ["--threads", str(options.threads)] if options.threads else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if "OutOfMemoryError" in done.stderr or "out of memory" in done.stderr:
        return None
    raise SystemExit(f"{name}, batch {batch}: {done.stderr[-3000:]}")


def largest_batch(name: str, options: argparse.Namespace, most: int = 256) -> int:
    """The most pairs per step that fit: into the GPU, or on the CPU into --memory-limit."""

    def fits(batch: int) -> bool:
        found = in_own_process(name, options, batch)
        if found is None or options.device != "cpu":
            return found is not None
        return (found["peak_step_bytes"] or 0) <= options.memory_limit * 1e9

    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


if __name__ == "__main__":
    main()
