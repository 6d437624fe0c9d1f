"""Gradient checkpointing that is left to the plan: predicted, decided, remembered."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mapo_core import memory, memory_predict, session
from mapo_core.backward import accumulate
from mapo_core.data_order import Draw
from mapo_core.lora_file import read_lora
from mapo_core.memory import Measured
from mapo_core.memory_plan import GIB, read_decision
from mapo_core.reopen import export_run
from mapo_core.runs import EventWriter, RunDir, read_events

from .conftest import Run, lora_of, run_here

OPEN = {"steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": None}


def of_type(run: RunDir, *types: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run.events) if e["type"] in types]


def said(run: RunDir) -> list[dict[str, Any]]:
    return [e for e in of_type(run, "phase") if e["phase"] == "gradient checkpointing"]


def really_on(prepared: Any) -> bool:
    return prepared.model.unet.is_gradient_checkpointing


# --- the count -------------------------------------------------------------------------------------------------------


def test_what_is_kept_counts_once_and_is_gone() -> None:
    weight = torch.nn.Parameter(torch.ones(1000, 1000))
    x = torch.ones(1000, 1000)
    with memory_predict.KeptBytes([weight]) as kept:
        y = x @ weight  # keeps x
        z = y.sin() * y.view(-1).cos().view_as(y)  # keeps y once, its sine and its cosine
        assert kept.bytes == 4 * 4_000_000
        for _ in range(3):
            y = (y @ weight).relu()  # keeps its result; addresses come again, storages do not
    assert kept.bytes == 4 * 4_000_000 + 3 * 4_000_000
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        z.sum().backward()


@pytest.mark.parametrize(
    "groups",
    [
        pytest.param({}, id="joint"),
        pytest.param({"memory": {"split_pairs": "on"}}, id="split"),
        pytest.param({"method": {"type": "sft"}}, id="sft", marks=pytest.mark.slow),
        pytest.param(
            {"method": {"type": "dreambooth", "class_prompt": "a star", "class_images": 3}},
            id="dreambooth",
            marks=pytest.mark.slow,
        ),
        pytest.param({"adapter": {"text_encoder": True, "targets": ["attention", "feed_forward"]}}, id="text encoders"),
    ],
)
def test_the_forward_pass_that_keeps_nothing_counts_what_a_step_keeps(new_run: Run, groups: dict[str, Any]) -> None:
    training = {**OPEN, "gradient_checkpointing": False}
    prepared = session.prepare(new_run("counted", training=training, **groups), None, None)
    buckets = [e.bucket for e in prepared.pairs.entries]
    draws = [Draw(0, memory.worst_pair(prepared, [buckets[i] for i in prepared.train_indices]))] * 2
    parts = [prepared.model.unet, *prepared.model.text_encoders]
    counted: list[int] = []

    class Noted(memory_predict.KeptBytes):
        def __exit__(self, *reason: object) -> None:
            super().__exit__(*reason)
            counted.append(self.bytes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_predict, "KeptBytes", Noted)
        needed = memory_predict.plain_step_bytes(prepared, draws)
    most = kept_while(prepared, draws, parts)
    # The backward pass of a split step lets go of the rejected image's before the chosen one's are kept.
    assert counted[0] == pytest.approx(most, rel=0.02)
    assert needed > memory_predict.WORKING * counted[0]
    assert not really_on(prepared)


def kept_while(prepared: Any, draws: list[Draw], parts: list[Any]) -> int:
    """Bytes that autograd holds at most in a real step."""
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from activations import kept_for_backward

    prepared.step = 1
    buckets = [prepared.pairs.bucket(i) for i in prepared.train_indices]
    with kept_for_backward(p for part in parts for p in part.parameters()) as kept:
        accumulate(prepared, draws, buckets)
    return kept.peak_bytes


# --- the decision ----------------------------------------------------------------------------------------------------


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch):
    """Pretend how much memory there is, and what a step without checkpointing would take."""

    def pretend(available: int, needed: int) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda device: available)
        monkeypatch.setattr(memory, "plain_step_bytes", lambda prepared, draws: needed)

    return pretend


@pytest.mark.parametrize(("needed", "on"), [(6 * GIB, False), (7 * GIB, True)])
def test_it_is_off_where_a_step_leaves_room_without_it(new_run: Run, room: Any, needed: int, on: bool) -> None:
    room(8 * GIB, needed)
    run = new_run("open", training=OPEN)
    prepared = session.prepare(run, None, None)
    assert really_on(prepared) == prepared.plan.gradient_checkpointing == on
    decision = read_decision(run)
    assert decision is not None
    assert decision.plan.gradient_checkpointing == on
    assert decision.rungs == ()
    # A resumed run does the same, however much memory there is then.
    room(8 * GIB, 30 * GIB if not on else 1)
    again = session.prepare(run, None, None)
    assert really_on(again) == again.config.training.gradient_checkpointing == on
    assert again.asked.training.gradient_checkpointing is None


def test_the_run_says_what_was_decided_and_the_file_says_how_it_was_trained(new_run: Run, room: Any) -> None:
    room(8 * GIB, 2 * GIB)
    run = new_run("told", training={**OPEN, "steps": 1, "train_batch_size": 1, "gradient_accumulation_steps": 1})
    run_here(run)
    (event,) = said(run)
    assert event["gradient_checkpointing"] is False
    assert "2.00 GiB of 8.00 GiB: it is off" in event["message"]
    for path in (run.export / f"{run.name}.safetensors", export_run(run)):
        assert read_lora(path).metadata["ss_gradient_checkpointing"] == "False"


def test_a_measurement_that_says_otherwise_switches_it_on(
    new_run: Run, room: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """7 of 8 GiB would do for a plan without a choice; here it is worth being sure."""
    room(8 * GIB, 2 * GIB)
    figures = [Measured(7 * GIB, 1.0), Measured(3 * GIB, 1.5)]
    monkeypatch.setattr(memory, "measure_steps", lambda prepared: figures.pop(0))
    run = new_run("measured", training=OPEN, memory={"preflight": "on"})
    with EventWriter(run) as events:
        assert really_on(session.prepare(run, events, None))
    assert [e["rung"] for e in of_type(run, "memory_step_down")] == ["gradient checkpointing"]
    decision = read_decision(run)
    assert decision is not None
    assert decision.plan.gradient_checkpointing
    assert decision.peak_memory_bytes == 3 * GIB


def test_a_forward_pass_that_runs_out_leaves_it_on(new_run: Run, room: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("pretended")

    room(8 * GIB, 0)
    monkeypatch.setattr(memory, "plain_step_bytes", out_of_memory)
    assert really_on(session.prepare(new_run("too-small", training=OPEN), None, None))


@pytest.mark.parametrize("settings", [{"plan": "manual"}, pytest.param({"preflight": "off"}, marks=pytest.mark.slow)])
def test_without_a_plan_it_stays_on_and_that_is_kept(new_run: Run, room: Any, settings: dict[str, str]) -> None:
    room(8 * GIB, 1)
    run = new_run("no-plan", training=OPEN, memory=settings)
    assert really_on(session.prepare(run, None, None))
    decision = read_decision(run)
    assert decision is not None
    assert decision.plan.gradient_checkpointing


@pytest.mark.slow
def test_an_open_run_is_the_run_with_it_and_the_run_without_it(new_run: Run, room: Any) -> None:
    """The forward pass of the prediction uses up no random number, and the decision changes no weight."""
    settings = {"adapter": {"rank": 4, "dropout": 0.2}, "data": {"flip": True}}

    def trained(name: str, checkpointing: bool | None) -> dict[str, torch.Tensor]:
        run = new_run(f"same-{name}", training={**OPEN, "gradient_checkpointing": checkpointing}, **settings)
        run_here(run)
        assert len(said(run)) == (checkpointing is None)
        return lora_of(run)

    found = [trained("on", True), trained("off", False), trained("open", None)]
    room(8 * GIB, 30 * GIB)
    found.append(trained("open-on", None))
    for other in found[1:]:
        assert all(torch.equal(other[k], v) for k, v in found[0].items())
