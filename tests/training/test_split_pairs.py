"""Split pairs: the gradients, losses and metrics of the joint form, in about half the activation memory."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import mapo_core.backward as backward
from mapo_core.backward import accumulate, split_backward
from mapo_core.batch import mean_squares, residuals
from mapo_core.data_order import Draw, step_groups
from mapo_core.replay import RandomState
from mapo_core.runs import read_events
from mapo_core.session import Session, prepare

from .conftest import Run, lora_of, run_here
from .test_equalities import METHODS, stop_after

SPLIT = {"memory": {"split_pairs": "on"}}
FORMS = {
    **METHODS,
    "paper": {"type": "mapo", "parametrisation": "paper", "beta": 8.0},
    "mapo-safeguard": {**METHODS["mapo"], "safeguard": True, "safeguard_mu": 0.9},
    "dpo-safeguard": {**METHODS["diffusion_dpo"], "safeguard": True, "safeguard_mu": 0.6},
}


def prepared(run: Any) -> Session:
    """A session whose LoRA is no longer the base model, so that all gradients are there."""
    session = prepare(run, None, None)
    generator = torch.Generator().manual_seed(0)
    for parameter in session.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    session.step = 1
    return session


def step_of(session: Session, *, split: bool) -> tuple[dict[str, float], torch.Tensor]:
    """Sums and gradients of the first step."""
    session.split_pairs = split
    buckets = [session.pairs.entries[i].bucket for i in session.train_indices]
    for parameter in session.parameters:
        parameter.grad = None
    sums = accumulate(session, next(step_groups(buckets, 4, session.config.seed)), buckets)
    # SDXL takes the last layer but one of a text encoder, so the last one's LoRA has no gradient.
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in session.parameters])
    return {k: v.item() for k, v in sums.items()}, found


@pytest.mark.parametrize("form", FORMS)
def test_both_forms_have_the_same_gradients_losses_and_metrics(
    new_run: Run, drawn_pairs: list[dict[str, Any]], form: str
) -> None:
    weighted = [{**r, "weight": 0.5 + i / 4} for i, r in enumerate(drawn_pairs)]
    data = {"flip": True, "caption_dropout": 0.3}
    session = prepared(new_run(f"split-{form}", pairs=weighted, method=FORMS[form], data=data))
    joint, split = step_of(session, split=False), step_of(session, split=True)
    assert joint[1].abs().max() > 0
    assert (joint[1] - split[1]).abs().max() / joint[1].abs().max() < 1e-5
    assert joint[0].keys() == split[0].keys()
    for name, total in joint[0].items():  # rewards are differences of nearly equal errors, times a factor
        assert split[0][name] == pytest.approx(total, rel=1e-5, abs=2e-4 if "/" in name else 0), name


@pytest.mark.parametrize("method", ["mapo", "dco"])
def test_both_forms_have_the_same_gradients_where_text_encoders_are_trained(new_run: Run, method: str) -> None:
    run = new_run(f"split-text-{method}", method=METHODS[method], adapter={"text_encoder": True})
    session = prepared(run)
    assert session.model.trains_text
    joint, split = step_of(session, split=False), step_of(session, split=True)
    assert (joint[1] - split[1]).abs().max() / joint[1].abs().max() < 1e-5
    of_unet = {id(p) for p in session.model.unet.parameters()}
    text = [p for p in session.parameters if id(p) not in of_unet]
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in text)


def test_the_safeguard_scales_the_gradient_of_the_rejected_image_alone(
    new_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = prepared(new_run("guarded", method={**METHODS["mapo"], "safeguard": True}))
    pulls: list[dict[str, torch.Tensor]] = []
    batches: list[Any] = []
    real = backward.pulls_of

    def keep(*arguments: Any) -> Any:
        found = real(*arguments)
        pulls.append(found[0])
        batches.append(arguments[2])
        return found

    def gradient(factor: float) -> torch.Tensor:
        monkeypatch.setattr(backward, "safeguard_factor", lambda *_: torch.full((2,), factor))
        for parameter in session.parameters:
            parameter.grad = None
        backward.backward_batch(session, [Draw(0, 1), Draw(1, 1)], 2)
        return torch.cat([p.grad.flatten() for p in session.parameters if p.grad is not None])

    monkeypatch.setattr(backward, "pulls_of", keep)
    whole, half, none = (gradient(f) for f in (1.0, 0.5, 0.0))
    assert (half - (whole + none) / 2).abs().max() / whole.abs().max() < 1e-5
    for parameter in session.parameters:
        parameter.grad = None
    batch = batches[-1]
    rows = batch.chosen_rows
    k = mean_squares(batch, residuals(session.model, session.family, batch, rows), rows)
    (k * pulls[-1]["chosen_mse"]).sum().backward()
    alone = torch.cat([p.grad.flatten() for p in session.parameters if p.grad is not None])
    assert (none - alone).abs().max() / alone.abs().max() < 1e-5
    assert (whole - alone).abs().max() / alone.abs().max() > 1e-2


def test_the_second_chosen_pass_has_the_dropout_of_the_first(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("split-dropout", method=METHODS["mapo"], adapter={"dropout": 0.5}, **SPLIT)
    session = prepared(run)
    seen: list[Any] = []

    def keep(*arguments: Any) -> Any:
        seen.append((arguments, RandomState.of(torch.device("cpu"))))
        return split_backward(*arguments)

    monkeypatch.setattr(backward, "split_backward", keep)
    backward.backward_batch(session, [Draw(0, 1), Draw(1, 1)], 2)
    found = [p.grad.clone() for p in session.parameters if p.grad is not None]
    after = torch.get_rng_state()
    # The same by one backward pass through both images, each in a forward pass of its own.
    ((_, batch, _, share), state) = seen[0]
    for parameter in session.parameters:
        parameter.grad = None
    state.restore()
    errors = {
        name: mean_squares(batch, residuals(session.model, session.family, batch, rows), rows)
        for name, rows in (("chosen_mse", batch.chosen_rows), ("rejected_mse", batch.rejected_rows))
    }
    (session.loss(**errors)[0] * batch.weights).sum().div(share).backward()
    assert torch.equal(torch.get_rng_state(), after)  # the next batch drops something else
    scale = max(g.abs().max() for g in found)
    worst = max((p.grad - g).abs().max() for p, g in zip(session.parameters, found, strict=True) if p.grad is not None)
    assert worst / scale < 1e-5
    with torch.no_grad():
        other = mean_squares(batch, residuals(session.model, session.family, batch, batch.chosen_rows))
    assert not torch.allclose(other, errors["chosen_mse"], rtol=1e-4)  # else this could not fail


@pytest.mark.parametrize("method", ["mapo", "dreambooth"])
def test_split_runs_repeat_and_resume_bit_for_bit(new_run: Run, method: str) -> None:
    settings = {
        "method": METHODS[method],
        "training": {
            "steps": 3,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
        },
        "adapter": {"dropout": 0.3},
        **SPLIT,
    }
    whole, parts = new_run(f"split-whole-{method}", **settings), new_run(f"split-parts-{method}", **settings)
    run_here(whole)
    run_here(parts, before_training=stop_after(parts, 1))
    assert parts.latest_checkpoint().name == "step_00000001"
    run_here(parts)
    a, b = lora_of(whole), lora_of(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
    curves = [[e["loss"] for e in read_events(r.events) if e["type"] == "step"] for r in (whole, parts)]
    assert curves[0] == curves[1]


@pytest.mark.parametrize("method", ["mapo", "inpo"])
def test_under_autocast_both_forms_agree(new_run: Run, method: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    session = prepared(new_run(f"split-bf16-{method}", method=METHODS[method], training={"precision": "bf16"}))
    joint, split = step_of(session, split=False), step_of(session, split=True)
    assert torch.nn.functional.cosine_similarity(joint[1], split[1], dim=0) > 0.99
    assert split[0]["chosen_mse"] == pytest.approx(joint[0]["chosen_mse"], rel=1e-2)


def test_a_pair_needs_the_activations_of_one_image(new_run: Run) -> None:
    spec = importlib.util.spec_from_file_location(
        "activations", Path(__file__).parents[2] / "benchmarks" / "activations.py"
    )
    assert spec is not None
    assert spec.loader is not None
    activations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(activations)
    session = prepared(new_run("split-memory", method=METHODS["mapo"]))
    peaks = {}
    for split in (False, True):
        with activations.kept_for_backward(session.model.unet.parameters()) as kept:
            step_of(session, split=split)
        assert kept.bytes == 0
        peaks[split] = kept.peak_bytes
    assert 0.4 < peaks[True] / peaks[False] < 0.6
