"""Preflight, plans and running out of memory, on real runs of the tiny model."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mapo_core import build_config, memory, session, trainer, validation
from mapo_core.errors import MemoryShortError
from mapo_core.memory import Measured
from mapo_core.memory_plan import GIB, first_plan, read_decision, with_plan
from mapo_core.report import run_report
from mapo_core.runs import RunDir, read_events

from .conftest import Run, lora_of, relative_difference, run_here

SMALL = {"steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": False}


def of_type(run: RunDir, *types: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run.events) if e["type"] in types]


def losses(run: RunDir) -> list[float]:
    return [e["loss"] for e in of_type(run, "step")]


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("pretended: no memory is left")


class Fails:
    """Calls a function, but runs out of memory at the given calls, counted from 1."""

    def __init__(self, real: Any, *calls: int) -> None:
        self.real, self.calls, self.count = real, set(calls), 0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.count += 1
        if self.count in self.calls or not self.calls:
            out_of_memory()
        return self.real(*arguments, **named)


class EndsAt:
    """Ends the training at a step, as a kill does."""

    def __init__(self, real: Any, step: int) -> None:
        self.real, self.step = real, step

    def __call__(self, prepared: Any, *rest: Any) -> Any:
        if prepared.step == self.step:
            raise KeyboardInterrupt
        return self.real(prepared, *rest)


# --- preflight -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "adamw8bit"])
def test_a_run_with_preflight_is_bit_for_bit_the_run_without(new_run: Run, optimizer: str) -> None:
    settings = {
        "training": SMALL,
        "optimizer": {"type": optimizer, "schedule": "cosine"},  # a warm-up would begin with steps that change nothing
        "adapter": {"rank": 16, "dropout": 0.2},
        "data": {"flip": True},
    }
    runs = [new_run(f"pre-{mode}-{optimizer}", memory={"preflight": mode}, **settings) for mode in ("off", "on")]
    for run in runs:
        run_here(run)
    a, b = (lora_of(run) for run in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert losses(runs[0]) == losses(runs[1])
    assert not any(e.get("phase") == "memory plan" for e in of_type(runs[0], "phase"))
    plan = next(e for e in of_type(runs[1], "phase") if e["phase"] == "memory plan")
    assert plan["peak_memory_bytes"] > 100 * 2**20  # a process with torch in it
    assert plan["budget_bytes"] > plan["peak_memory_bytes"]
    assert plan["seconds_left"] == pytest.approx(2 * plan["seconds_per_step"])
    assert plan["rungs"] == []


def test_the_worst_pair_is_the_largest_with_the_longest_prompt(new_run: Run) -> None:
    prepared = session.prepare(new_run("worst"), None, None)
    buckets = [prepared.pairs.entries[i].bucket for i in prepared.train_indices]
    pixels = [w * h for w, h in buckets]
    found = memory.worst_pair(prepared, buckets)
    entries = [prepared.pairs.entries[i] for i in prepared.train_indices]
    assert pixels[found] == max(pixels)
    assert len(set(buckets)) > 1
    longest = max(len(e.prompt) for e, p in zip(entries, pixels, strict=True) if p == max(pixels))
    assert len(entries[found].prompt) == longest


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch):
    """Pretend measurements, in order; the last one is given again and again."""

    real = memory.measure_steps

    def pretend(*values: Measured, steps: bool = False) -> None:
        rest = list(values)

        def measure(prepared: Any) -> Measured:
            if steps:
                real(prepared)
            return rest.pop(0) if len(rest) > 1 else rest[0]

        monkeypatch.setattr(memory, "measure_steps", measure)
        monkeypatch.setattr(memory, "available_bytes", lambda device: 8 * GIB)

    return pretend


def test_savings_are_added_until_it_fits_and_each_says_what_it_cost(new_run: Run, figures: Any) -> None:
    figures(Measured(None, None), Measured(20 * GIB, 1.0), Measured(9 * GIB, 2.0), Measured(7 * GIB, 3.0), steps=True)
    run = new_run("ladder", training=SMALL, memory={"preflight": "on"})
    run_here(run)
    steps = of_type(run, "memory_step_down")
    assert [e["rung"] for e in steps] == ["gradient checkpointing", "8-bit Adam", "split pairs"]
    assert steps[0]["before"]["peak_memory_bytes"] is None
    assert steps[1]["before"] == {"peak_memory_bytes": 20 * GIB, "seconds_per_step": 1.0}
    assert steps[1]["after"] == {"peak_memory_bytes": 9 * GIB, "seconds_per_step": 2.0}
    assert "9.00 GiB and 2.00 s per step" in steps[1]["message"]
    assert of_type(run, "run_finished")
    decision = read_decision(run)
    assert decision is not None
    assert decision.rungs == ("gradient checkpointing", "8-bit Adam", "split pairs")
    assert decision.peak_memory_bytes == 7 * GIB


def test_a_ladder_that_ends_says_what_to_do(new_run: Run, figures: Any) -> None:
    figures(Measured(20 * GIB, 1.0))
    run = new_run("too-large", training=SMALL, memory={"preflight": "on", "base_precision": "full"})
    with pytest.raises(MemoryShortError, match=r"20\.00 GiB, 8\.00 GiB may be used.*memory\.base_precision"):
        run_here(run)


def test_manual_measures_and_warns_but_changes_nothing(new_run: Run, figures: Any) -> None:
    figures(Measured(20 * GIB, 1.0))
    run = new_run("manual", training=SMALL, memory={"preflight": "on", "plan": "manual"})
    plain = new_run("manual-plain", training=SMALL)
    run_here(run)
    run_here(plain)
    assert not of_type(run, "memory_step_down")
    assert [e["code"] for e in of_type(run, "warning")] == ["memory_budget"]
    assert losses(run) == losses(plain)


def test_the_base_in_fewer_bits_is_measured_and_trains(new_run: Run) -> None:
    found = {}
    short = {**SMALL, "steps": 1, "gradient_accumulation_steps": 1}
    for form in ("full", "fp8", "int8", "nf4"):
        run = new_run(f"base-{form}", training=short, memory={"base_precision": form})
        run_here(run)
        assert of_type(run, "run_finished")
        ready = next(e for e in of_type(run, "phase") if e["phase"] == "ready")
        assert ready["base_precision"] == form
        found[form] = ready["base_error"]
        said = [e for e in of_type(run, "phase") if e["phase"] == f"base in {form}"]
        assert len(said) == (form != "full")
        report = run_report(run)
        assert (f"base in {form}, whose prediction is off by {found[form] or 0:.1%}" in report) == (form != "full")
    assert found["full"] is None
    assert 0 < found["int8"] < found["nf4"] < 0.2
    assert 0 < found["fp8"] < 0.1


@pytest.mark.slow
def test_a_resumed_run_keeps_its_savings_and_is_bit_for_bit_the_uninterrupted_one(
    new_run: Run, figures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {
        "training": {**SMALL, "steps": 4},
        "memory": {"preflight": "on", "split_pairs": "off"},
        "checkpoint": {"every_steps": 2},
    }
    runs = []
    for name in ("once", "twice"):
        figures(*[Measured(20 * GIB, 1.0)] * 5, Measured(7 * GIB, 1.0))
        run = new_run(f"kept-{name}", **settings)
        if name == "twice":
            with monkeypatch.context() as patch:
                patch.setattr(trainer, "train_step", EndsAt(trainer.train_step, 3))
                with pytest.raises(KeyboardInterrupt):
                    run_here(run)
            figures(Measured(7 * GIB, 1.0))  # a measurement now would say that nothing need be saved
        run_here(run)
        runs.append(run)
    assert [d.plan.base_precision for d in map(read_decision, runs) if d] == ["nf4", "nf4"]
    a, b = (lora_of(run) for run in runs)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert sum(e.get("phase") == "memory plan" for e in of_type(runs[1], "phase")) == 1


def test_another_machine_measures_again_from_what_was_decided(new_run: Run, figures: Any) -> None:
    figures(Measured(20 * GIB, 1.0), Measured(7 * GIB, 1.0))
    run = new_run("moves", training=SMALL, memory={"preflight": "on"})
    run_here(run)
    text = json.loads(run.memory.read_text())
    run.memory.write_text(json.dumps({**text, "machine": "another"}))
    figures(Measured(9 * GIB, 1.0), Measured(7 * GIB, 1.0))
    run_here(run)
    assert "other_machine" in [e.get("code") for e in of_type(run, "warning")]
    assert read_decision(run).rungs == ("gradient checkpointing", "8-bit Adam")


# --- running out -----------------------------------------------------------------------------------------------------


def test_a_step_that_runs_out_is_the_same_step_one_rung_lower(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    along = {"optimizer": {"eps": 1.0, "learning_rate": 0.5, "weight_decay": 0.0}}
    plain = new_run("mid-plain", training={**SMALL, "steps": 3}, method={"type": "mapo", "logit_scale": 100.0}, **along)
    run_here(plain)
    run = new_run("mid", training={**SMALL, "steps": 3}, method={"type": "mapo", "logit_scale": 100.0}, **along)
    import mapo_core.backward as backward

    # Each of the first three tries of step 2 fails in its second batch, so with gradients of the first one.
    monkeypatch.setattr(backward, "backward_shown", Fails(backward.backward_shown, 4, 6, 8))
    run_here(run)
    assert [e["rung"] for e in of_type(run, "memory_step_down")] == ["gradient checkpointing", "split pairs"]
    assert losses(run) == pytest.approx(losses(plain), rel=1e-5)
    assert relative_difference(lora_of(run), lora_of(plain)) < 2e-5
    assert of_type(run, "run_finished")
    assert read_decision(run).plan.split_pairs


PHASES = {
    # what fails, at which calls (none: always), and how it must end
    "load": ("mapo_core.memory.place_base", (1,), "finished"),
    "load for good": ("mapo_core.memory.place_base", (), "error"),
    "encode": ("mapo_core.session.encode_pairs", (1,), "finished"),
    "encode for good": ("mapo_core.session.encode_pairs", (), "error"),
    "preflight": ("mapo_core.memory.accumulate", (1, 3), "finished"),
    "preflight for good": ("mapo_core.memory.accumulate", (), "error"),
    "forward": ("mapo_core.trainer.accumulate", (2, 3), "finished"),
    "forward for good": ("mapo_core.trainer.accumulate", (2, 3, 4, 5, 6, 7, 8), "kept"),
    "backward": ("accelerate.Accelerator.backward", (2, 3), "finished"),
    "optimizer": ("mapo_core.trainer.step_or_back", (2,), "kept"),
    "validation": ("mapo_core.validation.held_out_errors", (1,), "finished"),
    "validation for good": ("mapo_core.validation.held_out_errors", (), "finished"),
    "sampling": ("mapo_core.validation.sample_images", (2,), "finished"),
    "sampling for good": ("mapo_core.validation.sample_images", (), "finished"),
    "checkpoint": ("mapo_core.checkpoints.save_checkpoint", (2,), "kept"),
    "export": ("mapo_core.validation.export_lora", (), "kept"),
}


# What differs from its neighbour in the place alone takes its time with the slow tests.
LONG = {"preflight for good", "validation for good", "sampling for good", "encode for good", "load"}


@pytest.mark.parametrize("phase", [pytest.param(p, marks=[pytest.mark.slow] if p in LONG else []) for p in PHASES])
def test_out_of_memory_at_every_phase_ends_in_a_finished_run_or_a_clear_error_with_all_work_kept(
    new_run: Run, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    place, calls, end = PHASES[phase]
    module, name = place.rsplit(".", 1)
    owner = Accelerator if module == "accelerate.Accelerator" else importlib.import_module(module)
    run = new_run(
        f"oom-{phase.replace(' ', '-')}",
        training={**SMALL, "steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 1},
        memory={"preflight": "on" if "preflight" in phase else "off"},
        validation={"every_steps": 2, "draws": 1, "sample_every_steps": 2, "width": 32, "height": 32},
        checkpoint={"every_steps": 1, "keep": 9},
    )
    fails = Fails(getattr(owner, name), *calls)
    monkeypatch.setattr(owner, name, fails if owner is not Accelerator else lambda self, *a, **k: fails(self, *a, **k))
    if end == "finished":
        run_here(run)
        assert of_type(run, "run_finished")
        assert len(losses(run)) == 3
        assert (run.export / f"{run.name}.safetensors").exists()
    else:
        with pytest.raises(MemoryShortError) as caught:
            run_here(run)
        assert len(str(caught.value)) > 60
        assert "resume" in str(caught.value) or "start again" in str(caught.value)
    assert fails.count > (max(calls) if calls else 0) or end != "finished"
    if end == "kept":  # every step that was done is there, and the run goes on from it
        done = len(losses(run))
        newest = run.latest_checkpoint()
        assert newest is not None
        assert newest.name == f"step_{done:08d}"
        monkeypatch.undo()
        monkeypatch.setenv("MAPO_HOME", str(run.path.parent.parent))
        run_here(run)
        assert of_type(run, "run_finished")
        assert (run.export / f"{run.name}.safetensors").exists()


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.slow), "adamw8bit"])
def test_an_optimizer_step_that_breaks_off_is_done_again_from_the_same_weights(
    new_run: Run, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    settings = {"training": {**SMALL, "steps": 3}, "optimizer": {"type": optimizer}, "adapter": {"rank": 16}}
    plain, run = new_run(f"whole-step-{optimizer}", **settings), new_run(f"broken-step-{optimizer}", **settings)
    run_here(plain)
    real_build = session.build_optimizer

    def build(*arguments: Any) -> Any:
        made = real_build(*arguments)
        real, count = made.step, [0]

        def step(*a: Any, **k: Any) -> Any:
            count[0] += 1
            result = real(*a, **k)
            if count[0] in (1, 3):  # weights and state have changed already
                out_of_memory()
            return result

        made.step = step
        return made

    monkeypatch.setattr(session, "build_optimizer", build)
    run_here(run)
    a, b = lora_of(run), lora_of(plain)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_other_errors_are_not_taken_for_memory(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(validation, "held_out_errors", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run_here(new_run("defect", training=SMALL))


def test_slow_steps_on_a_full_device_are_said_once(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = session.prepare(new_run("spill"), None, None)
    said: list[dict[str, Any]] = []
    prepared.emit = lambda type_, **fields: said.append({"type": type_, **fields})
    prepared.expected_pace = 1.0
    monkeypatch.setattr(trainer, "used_share", lambda device: 0.98)
    trainer.watch_pace(prepared, [1.0] * 5)
    assert said == []
    for _ in range(2):
        trainer.watch_pace(prepared, [8.0] * 5)
    assert [e["code"] for e in said] == ["memory_spill"]


def test_the_rung_of_8_bit_adam_drops_the_fused_step_and_nothing_else_does() -> None:
    values = {"name": "a", "model": {"path": "demo"}, "data": {"pairs": "p"}, "memory": {"fused_optimizer": True}}
    config = build_config({**values, "optimizer": {"type": "adamw"}})
    plan = first_plan(config)
    assert with_plan(config, plan).memory.fused_optimizer
    less = with_plan(config, plan.model_copy(update={"optimizer": "adamw8bit"}))
    assert (less.optimizer.type, less.memory.fused_optimizer) == ("adamw8bit", False)
    wrong = build_config({**values, "optimizer": {"type": "adamw8bit"}})
    assert with_plan(wrong, first_plan(wrong)).memory.fused_optimizer  # the user's own mistake is told
