"""What a bf16 step without autocast loses against one with it, and against fp32, on the demo model.

    python benchmarks/bf16.py        # some minutes on a CPU

For each method a short fp32 training gives weights; at these weights gradients and losses are computed in all three
ways, mean of four steps. Then the same training runs in all three, and its LoRA is measured in fp32 on the held-out
pairs.

On the CPU torch's autocast leaves norms in the precision of what they are given, so with a bf16 model it changes
nothing at all; on CUDA it runs them in float32. That is what "autocast" stands for here: norms in float32, with float32
results.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional  # noqa: E402

from mapo_core.adapter import adapter_state, load_adapter_state  # noqa: E402

PAIRS, HELD_OUT, BATCH, DRAWS = 32, 12, 4, 4
METHODS: dict[str, dict[str, Any]] = {
    "MaPO, official": {"type": "mapo", "margin_weight": 0.1},
    "MaPO, paper": {"type": "mapo", "parametrisation": "paper", "beta": 64.0},
    "Diffusion-DPO": {"type": "diffusion_dpo"},
    "SFT": {"type": "sft"},
}
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16, autocast": {"precision": "bf16", "autocast": True},
    "bf16, without": {"precision": "bf16", "autocast": False},
}
RATES = {"diffusion_dpo": 3e-4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MAPO_HOME"] = str(Path(folder) / "home")
        pairs = drawn(Path(folder))
        sessions = {way: opened(way, pairs) for way in WAYS}
        fresh = {name: tensor.clone() for name, tensor in adapter_state(sessions["fp32"].model).items()}
        print("| method | precision | gradient off by | loss off by | accuracy | margin | error on chosen |")
        print("|---|---|---|---|---|---|---|")
        for method in options.methods:
            compare(method, sessions, fresh, options.steps)


def compare(method: str, sessions: dict[str, Any], fresh: dict[str, Tensor], steps: int) -> None:
    """Print the rows of one method."""
    trained: dict[str, dict[str, Tensor]] = {}
    for way, session in sessions.items():
        choose(session, method, fresh)
        with as_on_cuda("autocast" in way):
            trained[way] = train_run(session, steps)
    exact = [gradient(sessions["fp32"], trained["fp32"], draw) for draw in range(DRAWS)]
    for way, session in sessions.items():
        with as_on_cuda("autocast" in way):
            found = [gradient(session, trained["fp32"], draw) for draw in range(DRAWS)]
        off = statistics.mean(((a - b).norm() / b.norm()).item() for (a, _), (b, _) in zip(found, exact, strict=True))
        loss_off = statistics.mean(abs(a - b) / abs(b) for (_, a), (_, b) in zip(found, exact, strict=True))
        measured = held_out(sessions["fp32"], trained[way])
        print(
            f"| {method} | {way} | {off:.2%} | {loss_off:.2%} "
            f"| {measured.accuracy:.3f} | {measured.margin:.5f} | {measured.chosen_mse:.5f} |",
            flush=True,
        )


def drawn(folder: Path) -> str:
    """Pairs of the demo's scenes, cartoon before plain, as pairs.jsonl."""
    from mapo_core.demo.scenes import render, scenes

    lines = []
    for i, scene in enumerate(itertools.islice(scenes(7, held_out=False), PAIRS)):
        record: dict[str, Any] = {"prompt": scene.caption, "held_out": i >= PAIRS - HELD_OUT}
        for side, style in (("chosen", "cartoon"), ("rejected", "plain")):
            record[side] = str(folder / f"{side}-{i}.png")
            render(scene, style, 64).save(record[side])
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"


@contextmanager
def as_on_cuda(on: bool) -> Iterator[None]:
    """Inside, norms are computed in float32 and give float32, as CUDA's autocast has them."""
    before = functional.group_norm, functional.layer_norm

    def in_float32(norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, *rest: Any, **named: Any) -> Tensor:
            parts = (None if p is None else p.float() for p in (weight, bias))
            return norm(x.float(), shape, *parts, *rest, **named)

        return call

    if on:
        functional.group_norm, functional.layer_norm = map(in_float32, before)
    try:
        yield
    finally:
        functional.group_norm, functional.layer_norm = before


def opened(way: str, pairs: str) -> Any:
    """A run's session before its first step."""
    from accelerate.state import AcceleratorState

    from mapo_core import build_config
    from mapo_core.runs import create_run
    from mapo_core.session import prepare

    values = {
        "name": "bf16",
        "model": {"path": "demo"},
        "data": {"pairs": "pairs.jsonl", "bucket": False},
        "adapter": {"rank": 16, "targets": ["attention", "feed_forward"]},
        "optimizer": {"type": "adamw", "warmup_steps": 0},
        "training": {
            **WAYS[way],
            "steps": 1000,
            "train_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "device": "cpu",
            "gradient_checkpointing": False,
        },
        "guard": {"enabled": False},
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    return prepare(create_run("bf16", build_config(values).to_json(), pairs), None, None)


def choose(session: Any, method: str, weights: dict[str, Tensor]) -> None:
    """Let a session begin anew with a method, from these weights."""
    from mapo_core import build_config, merge_settings
    from mapo_core.session import rebuild

    rate = RATES.get(METHODS[method]["type"], 2e-3)
    values = merge_settings(json.loads(session.config.to_json()), {"optimizer": {"learning_rate": rate}})
    session.config = build_config({**values, "method": METHODS[method]})
    session.loss = session.config.method.build("demo")
    session.step = 0
    load_adapter_state(session.model, weights)
    rebuild(session)


def train_run(session: Any, steps: int) -> dict[str, Tensor]:
    """The LoRA after the steps."""
    from mapo_core.data_order import step_groups
    from mapo_core.trainer import train_step

    buckets = [session.pairs.bucket(i) for i in session.train_indices]
    groups = step_groups(buckets, BATCH, session.config.seed)
    for _ in range(steps):
        session.step += 1
        train_step(session, next(groups), buckets)
    return {name: tensor.clone() for name, tensor in adapter_state(session.model).items()}


def gradient(session: Any, weights: dict[str, Tensor], draw: int) -> tuple[Tensor, float]:
    """The gradient of one step at these weights, flat, and its loss; every draw shows other pairs."""
    from mapo_core.backward import accumulate
    from mapo_core.data_order import step_groups

    load_adapter_state(session.model, weights)
    session.optimizer.zero_grad(set_to_none=True)
    session.step = 1
    buckets = [session.pairs.bucket(i) for i in session.train_indices]
    sums = accumulate(session, next(step_groups(buckets, BATCH, draw)), buckets)
    return torch.cat([p.grad.flatten() for p in session.parameters]), sums["loss"].item() / BATCH


def held_out(session: Any, weights: dict[str, Tensor]) -> Any:
    """Measures of a LoRA on the held-out pairs, by a session in fp32."""
    from mapo_core.evaluate.held_out import measure_held_out

    load_adapter_state(session.model, weights)
    return measure_held_out(
        session.model, session.family, session.pairs, session.held_out_indices, draws=8, seed=0, batch_size=BATCH
    )


if __name__ == "__main__":
    main()
