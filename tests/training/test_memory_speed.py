"""The switches that make a step faster: the numbers stay what they are."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mapo_core import backward, session
from mapo_core.errors import ConfigError
from mapo_core.runs import read_events
from mapo_core.speed import allow_tf32, fuse

from .conftest import Run, lora_of, run_here

SMALL = {"steps": 2, "train_batch_size": 1, "gradient_accumulation_steps": 3, "gradient_checkpointing": False}


@pytest.fixture
def tf32_as_it_was() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def losses(run: Any) -> list[float]:
    return [e["loss"] for e in read_events(run.events) if e["type"] == "step"]


def test_batches_read_ahead_are_the_same_batches(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, set[str]] = {}
    real = backward.read_batch

    def seen(prepared: Any, draws: Any) -> Any:
        threads.setdefault(prepared.run.name, set()).add(threading.current_thread().name)
        return real(prepared, draws)

    monkeypatch.setattr(backward, "read_batch", seen)
    runs = [
        new_run(f"ahead-{on}", training=SMALL, memory={"prefetch": on}, data={"flip": True, "caption_dropout": 0.3})
        for on in (True, False, None)
    ]
    for run in runs:
        run_here(run)
    a, b, c = (lora_of(run) for run in runs)
    assert all(torch.equal(a[k], b[k]) and torch.equal(a[k], c[k]) for k in a)
    assert losses(runs[0]) == losses(runs[1])
    assert threads["ahead-None"] == {"MainThread"}  # on the CPU there is nothing to gain
    assert all(name.startswith("mapo-prefetch") for name in threads["ahead-True"])
    assert threads["ahead-False"] == {"MainThread"}


def test_what_fails_while_reading_ahead_fails_the_step(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = backward.read_batch

    def broken(prepared: Any, draws: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return real(prepared, draws)

    monkeypatch.setattr(backward, "read_batch", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        run_here(new_run("ahead-broken", training=SMALL, memory={"prefetch": True}))


@pytest.mark.parametrize(
    ("switch", "optimizer"), [("channels_last", "adamw"), ("fused_optimizer", "adamw"), ("tf32", "adamw8bit")]
)
@pytest.mark.usefixtures("tf32_as_it_was")
def test_a_switch_changes_no_loss_beyond_rounding(new_run: Run, switch: str, optimizer: str) -> None:
    plain = new_run(f"plain-{switch}", training=SMALL, optimizer={"type": optimizer})
    run = new_run(f"with-{switch}", training=SMALL, optimizer={"type": optimizer}, memory={switch: True})
    run_here(plain)
    run_here(run)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


def test_channels_last_and_fused_are_really_on(new_run: Run) -> None:
    prepared = session.prepare(new_run("really", memory={"channels_last": True, "fused_optimizer": True}), None, None)
    convolution = prepared.model.unet.conv_in.weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    assert not convolution.is_contiguous()
    assert all(group["fused"] for group in prepared.optimizer.param_groups)
    with pytest.raises(ConfigError, match="fused_optimizer"):
        fuse(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))]))


@pytest.mark.usefixtures("tf32_as_it_was")
def test_tf32_is_allowed_where_it_is_asked_for() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    allow_tf32(False)
    assert not torch.backends.cuda.matmul.allow_tf32
    allow_tf32(True)
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_give_the_same_losses(new_run: Run) -> None:
    short = {**SMALL, "steps": 1, "gradient_accumulation_steps": 1}
    plain, run = new_run("eager", training=short), new_run("compiled", training=short, memory={"compile": True})
    run_here(plain)
    run_here(run)
    assert losses(run) == pytest.approx(losses(plain), rel=1e-4)


def test_what_cannot_be_compiled_is_said_before_training(new_run: Run) -> None:
    run = new_run("not-compiled", training=SMALL, memory={"compile": True, "base_precision": "nf4"})
    with pytest.raises(ConfigError, match="full precision"):
        run_here(run)
