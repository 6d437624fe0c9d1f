"""What only an NVIDIA GPU shows: `pytest -m cuda tests/training/test_cuda.py`; what a CPU can check, it checks."""

from __future__ import annotations

import math
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from mapo_core import trainer
from mapo_core.backward import accumulate
from mapo_core.data_order import step_groups
from mapo_core.memory_plan import read_decision
from mapo_core.runs import RunDir, read_events
from mapo_core.session import Session, prepare
from mapo_core.trainer import train_step

from .conftest import Run, lora_of, run_here

needs_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
CUDA = pytest.param("cuda", marks=needs_gpu)


def on(device: str, **more: Any) -> dict[str, Any]:
    """The training section for a device; pairs of equal size in one batch of two."""
    return {"device": device, "train_batch_size": 2, "gradient_accumulation_steps": 1, "steps": 3, **more}


def steps_of(run: RunDir) -> list[dict[str, Any]]:
    return [e for e in read_events(run.events) if e["type"] == "step"]


def gradients(session: Session) -> list[Tensor]:
    """Of the first step, with up weights that are not zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in session.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    buckets = [session.pairs.entries[i].bucket for i in session.train_indices]
    session.optimizer.zero_grad(set_to_none=True)
    accumulate(session, next(step_groups(buckets, 2, session.config.seed)), buckets)
    return [p.grad.clone() for p in session.parameters]


def step_peak(session: Session) -> int:
    """Bytes that the second step takes beyond what lies there."""
    buckets = [session.pairs.entries[i].bucket for i in session.train_indices]
    groups = step_groups(buckets, 2, session.config.seed)
    for _ in range(2):
        session.step += 1
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train_step(session, next(groups), buckets)
    return torch.cuda.max_memory_allocated() - before


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    scale = max(g.abs().max().item() for g in b)
    return max((x.cpu() - y.cpu()).abs().max().item() for x, y in zip(a, b, strict=True)) / scale


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "fp32"), ("cpu", "bf16"), *(pytest.param("cuda", p, marks=needs_gpu) for p in ("fp32", "bf16", "fp16"))],
)
def test_every_precision_trains(new_run: Run, device: str, precision: str, optimizer: str) -> None:
    run = new_run("cuda-precision", training=on(device, precision=precision), optimizer={"type": optimizer})
    run_here(run)
    assert read_events(run.events)[-1]["type"] == "run_finished"
    assert all(math.isfinite(e["loss"]) and e["peak_memory_bytes"] > 0 for e in steps_of(run))
    learned = [v for k, v in lora_of(run).items() if "lora_B" in k]
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in learned)
    assert any(v.abs().max() > 0 for v in learned)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_split_pairs_and_checkpointing_have_the_gradients_of_neither(new_run: Run, device: str) -> None:
    found = []
    for split, checkpointing in (("off", False), ("on", False), ("off", True), ("on", True)):
        training = on(device, precision="fp32", gradient_checkpointing=checkpointing)
        run = new_run(
            "form", training=training, memory={"split_pairs": split}, method={"type": "mapo", "logit_scale": 100.0}
        )
        found.append(gradients(prepare(run, None, None)))
    # On CUDA kernels may be chosen by the batch, and convolutions run in TF32 unless that is switched off.
    bound = 1e-5 if device == "cpu" else 5e-3
    assert all(worst(other, found[0]) < bound for other in found[1:])


@pytest.mark.parametrize("device", [CUDA])
def test_gradients_are_those_of_the_cpu(new_run: Run, device: str) -> None:
    found = [
        gradients(prepare(new_run("cuda-g", training=on(d, precision="fp32")), None, None)) for d in ("cpu", device)
    ]
    assert worst(found[1], found[0]) < 1e-2


@pytest.mark.parametrize("device", [CUDA])
def test_checkpointing_and_split_pairs_save_memory(new_run: Run, device: str) -> None:
    peaks = {}
    for split in ("off", "on"):
        for checkpointing in (False, True):
            training = on(device, gradient_checkpointing=checkpointing)
            run = new_run("cuda-peak", training=training, memory={"split_pairs": split}, data={"resolution": 128})
            peaks[split, checkpointing] = step_peak(prepare(run, None, None))
    assert peaks["on", False] < 0.75 * peaks["off", False]
    assert peaks["off", True] < peaks["off", False]
    assert peaks["on", True] < peaks["off", True]


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("method", ["mapo", "sft", "diffusion_dpo"])
def test_a_step_waits_for_the_device_once(new_run: Run, device: str, method: str) -> None:
    run = new_run("cuda-waits", training=on(device, precision="bf16"), method={"type": method})
    session = prepare(run, None, None)
    buckets = [session.pairs.entries[i].bucket for i in session.train_indices]
    groups = step_groups(buckets, 2, session.config.seed)
    for _ in range(2):  # the first ones make the optimizer's state
        session.step += 1
        train_step(session, next(groups), buckets)
    session.step += 1
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            train_step(session, next(groups), buckets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchronizing" in str(w.message)]
    assert len(waits) <= 1, [f"{w.filename}:{w.lineno}" for w in waits]


def test_the_trainer_builds_nothing_on_the_device_from_numbers_of_the_cpu(
    new_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`torch.tensor(number, device="cuda")` waits for the device; what can be checked of that without one."""
    session = prepare(new_run("cuda-numbers", training=on("cpu")), None, None)
    buckets = [session.pairs.entries[i].bucket for i in session.train_indices]
    groups = step_groups(buckets, 2, 0)
    session.step = 1
    train_step(session, next(groups), buckets)  # makes the optimizer's state
    real, made = torch.tensor, []

    def watched(*args: Any, **named: Any) -> Tensor:
        if named.get("device") is not None and sys._getframe(1).f_code.co_filename == trainer.__file__:
            made.append(args)
        return real(*args, **named)

    monkeypatch.setattr(torch, "tensor", watched)
    train_step(session, next(groups), buckets)
    assert not made


@pytest.mark.parametrize("device", [CUDA])
def test_tf32_is_torchs_default_unless_something_else_is_asked_for(new_run: Run, device: str) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    prepare(new_run("cuda-tf32", training=on(device)), None, None)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before == (False, True)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_resumed_run_goes_on_where_it_stopped(new_run: Run, device: str) -> None:
    """On CUDA some backward kernels add in any order, so that only the CPU is held to the bit."""
    from .test_equalities import stop_after

    settings = {"training": on(device, precision="fp32"), "optimizer": {"type": "adamw8bit"}}
    whole, parts = new_run("cuda-whole", **settings), new_run("cuda-parts", **settings)
    run_here(whole)
    run_here(parts, before_training=stop_after(parts, 1))
    run_here(parts)
    a, b = lora_of(whole), lora_of(parts)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=0 if device == "cpu" else 1e-4) for k in a)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("base", ["int8", "nf4", "fp8"])
def test_a_base_in_fewer_bits_trains_and_says_how_far_it_is_off(new_run: Run, device: str, base: str) -> None:
    run = new_run("cuda-base", training=on(device), memory={"base_precision": base, "preflight": "off"})
    run_here(run)
    assert read_events(run.events)[-1]["type"] == "run_finished"
    decision = read_decision(run)
    assert decision is not None
    assert 0 < (decision.base_error or 0) < 0.5


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_offloaded_blocks_give_the_same_gradients(new_run: Run, device: str, share: float) -> None:
    found = []
    for offload in ("off", "on"):
        memory = {"offload": offload, "offload_share": share, "preflight": "off"}
        run = new_run("cuda-offload", training=on(device, precision="fp32"), memory=memory)
        found.append(gradients(prepare(run, None, None)))
    assert worst(found[1], found[0]) < 1e-5


@pytest.mark.parametrize("device", [CUDA])
def test_the_preflight_measures_and_changes_nothing(new_run: Run, device: str) -> None:
    found = []
    for preflight in ("off", "on"):
        run = new_run(
            "cuda-preflight", training=on(device, precision="fp32"), memory={"plan": "auto", "preflight": preflight}
        )
        run_here(run)
        found.append(lora_of(run))
    decision = read_decision(run)
    assert decision is not None
    assert (decision.peak_memory_bytes or 0) > 0
    assert (decision.seconds_per_step or 0) > 0
    a, b = found
    assert all(torch.allclose(a[k], b[k], rtol=0, atol=1e-4) for k in a)


@pytest.mark.parametrize("device", [CUDA])
def test_compiled_blocks_give_nearly_the_same_gradients(new_run: Run, device: str) -> None:
    found = []
    for compiled in (False, True):
        memory = {"compile": compiled, "preflight": "off"}
        run = new_run("cuda-compile", training=on(device, precision="fp32"), memory=memory)
        found.append(gradients(prepare(run, None, None)))
    assert worst(found[1], found[0]) < 1e-2
