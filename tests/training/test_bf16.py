"""A bf16 step without autocast, which is MaPO's default for plain LoRAs, against one with it and against fp32."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from mapo_core import build_config, merge_settings
from mapo_core.backward import accumulate
from mapo_core.data_order import Draw
from mapo_core.session import prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from bf16 import as_on_cuda

from .conftest import Run
from .test_guard import cartoons, new_cartoon_run

__all__ = ["cartoons", "new_cartoon_run"]

METHODS: dict[str, dict[str, Any]] = {
    "mapo, official": {"type": "mapo", "margin_weight": 0.1},
    "mapo, paper": {"type": "mapo", "parametrisation": "paper", "beta": 64.0},
    "diffusion_dpo": {"type": "diffusion_dpo"},
}
BOUNDS = {  # of the gradient and of the loss, relative: about twice what was measured
    "mapo, official": (0.02, 0.005),
    "mapo, paper": (0.05, 0.005),
    "diffusion_dpo": (0.12, 0.2),
}
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "autocast": {"precision": "bf16", "autocast": True},
    "plain": {"precision": "bf16", "autocast": False},
}


@pytest.mark.slow
def test_preference_gradients_in_bf16_without_autocast_stay_within_their_bounds(new_cartoon_run: Run) -> None:
    """On the demo model, at weights that differ from the base: the links multiply the rounding of K by up to 1000."""
    found: dict[str, dict[str, tuple[torch.Tensor, float]]] = {}
    for way, training in WAYS.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        run = new_cartoon_run(
            f"precise-{way}",
            model={"path": "demo"},
            data={"resolution": None, "bucket": False},
            training={**training, "train_batch_size": 4, "gradient_accumulation_steps": 1},
        )
        session = prepare(run, None, None)
        with as_on_cuda(way == "autocast"):  # on the CPU, autocast alone would change nothing
            found[way] = gradients(session)
    for method in METHODS:
        exact, loss = found["fp32"][method]
        off = {w: ((found[w][method][0] - exact).norm() / exact.norm()).item() for w in ("autocast", "plain")}
        wrong = {w: abs(found[w][method][1] - loss) / abs(loss) for w in ("autocast", "plain")}
        print(f"{method}: gradient off by {off}, loss by {wrong}")
        assert 0 < off["plain"] < BOUNDS[method][0], method
        assert wrong["plain"] < BOUNDS[method][1], method
        assert off["plain"] != off["autocast"]  # else nothing is compared
        if method != "diffusion_dpo":  # there, one draw says nothing about the two: see benchmarks/bf16.py
            assert off["plain"] < 1.5 * off["autocast"] + 0.01, method


def gradients(session: Any) -> dict[str, tuple[torch.Tensor, float]]:
    """Gradient, flat, and loss of one step of each method at the same weights."""
    generator = torch.Generator().manual_seed(0)
    for parameter in session.parameters:
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    buckets = [session.pairs.bucket(i) for i in session.train_indices]
    results = {}
    for name, method in METHODS.items():
        values = {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p"}}
        session.loss = build_config(merge_settings(values, {"method": method})).method.build("demo")
        session.optimizer.zero_grad(set_to_none=True)
        session.step = 1
        sums = accumulate(session, [Draw(0, i) for i in range(4)], buckets)
        results[name] = (torch.cat([p.grad.flatten() for p in session.parameters]), sums["loss"].item() / 4)
    return results
