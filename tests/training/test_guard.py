"""The divergence guard: its statistic, that it takes a diverging run back, and that it leaves a healthy one alone."""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections import deque
from typing import Any

import pytest
import torch

import mapo_core.guarding as guarding
import mapo_core.trainer as trainer
from mapo_core.demo.scenes import render, scenes
from mapo_core.evaluate.held_out import HeldOutErrors
from mapo_core.guard import Guard, Start, judge, means
from mapo_core.runs import RunDir, checkpoint_step, read_events, run_history, run_status
from mapo_core.sections import GuardConfig

from .conftest import Run, run_here
from .test_optimizers import load_all, stop_at


def start_of(chosen: list[float], margin: float = 0.1) -> Start:
    return Start(chosen, [margin] * len(chosen), [0.0])


# --- the statistic ---------------------------------------------------------------------------------------------------


def test_a_rise_beyond_tolerance_and_noise_with_a_rising_margin_is_worse() -> None:
    start = start_of([0.10, 0.12, 0.08, 0.10])
    risen = judge(start, start_of([0.12, 0.14, 0.10, 0.12], 0.2), tolerance=0.1, z=3)
    assert risen.rise == pytest.approx(0.2)
    assert risen.band == pytest.approx(0, abs=1e-9)  # every pair by the same amount
    assert (risen.worse, risen.severe, risen.good) == (True, False, False)
    assert not judge(start, start_of([0.12, 0.14, 0.10, 0.12], 0.05), 0.1, 3).worse  # the margin falls: another matter
    assert not judge(start, start_of([0.105, 0.125, 0.085, 0.105], 0.2), 0.1, 3).worse  # inside the tolerance


def test_a_rise_of_one_pair_alone_is_noise() -> None:
    start = start_of([0.1] * 8)
    one = judge(start, start_of([0.1] * 7 + [0.3], 0.2), 0.1, 3)
    assert one.rise == pytest.approx(0.25)
    assert one.band == pytest.approx(3 * 2 * math.sqrt(7 * 0.125**2 * 0 + 7 / 8) / math.sqrt(7) / math.sqrt(8), rel=0.1)
    assert not one.worse


def test_a_rise_of_five_tolerances_counts_whatever_the_margin_does_and_so_does_what_is_not_finite() -> None:
    start = start_of([0.1] * 4)
    assert judge(start, start_of([0.16] * 4, -1.0), 0.1, 3).severe
    assert judge(start, start_of([math.inf] * 4, 0.0), 0.1, 3).severe
    assert judge(start, start_of([math.nan] * 4, 0.0), 0.1, 3).severe


def test_means_are_taken_per_pair_and_per_level() -> None:
    errors = HeldOutErrors([7, 3, 7, 3], [1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 5.0, 4.0], 2, [0, 0, 1, 1])
    found = means(errors)
    assert found.chosen == [3.0, 2.0]  # pairs 3 and 7
    assert found.margin == [0.0, 1.5]
    assert found.levels == pytest.approx([math.log(2) / 2, math.log(12) / 2])


def test_patience_waits_for_a_second_measurement_unless_it_is_severe_or_the_last() -> None:
    bad = judge(start_of([0.1] * 4), start_of([0.12] * 4, 0.2), 0.1, 3)
    severe = judge(start_of([0.1] * 4), start_of([0.2] * 4, 0.2), 0.1, 3)
    calm = judge(start_of([0.1] * 4), start_of([0.1] * 4), 0.1, 3)
    guard = Guard(GuardConfig(patience=2, window_steps=10))
    assert not guard.weigh(100, bad, last=False)
    assert guard.next_check == 110
    assert not guard.weigh(110, calm, last=False)  # it was nothing
    assert guard.next_check is None
    assert not guard.weigh(120, bad, last=False)
    assert guard.weigh(130, bad, last=False)
    assert Guard(GuardConfig()).weigh(5, severe, last=False)
    assert Guard(GuardConfig()).weigh(5, bad, last=True)


@pytest.mark.parametrize("seed", range(5))
def test_the_training_error_asks_for_a_measurement_when_it_rises_and_rarely_when_it_does_not(seed: int) -> None:
    rng = random.Random(seed)
    guard = Guard(GuardConfig(window_steps=20))
    asked = []
    for step in range(1, 2001):
        guard.note(step, rng.gauss(0, 0.3))
        if guard.next_check == step:
            asked.append(step)
            guard.last_check, guard.next_check = step, None
    assert len(asked) <= 2  # of 2000 steps: it costs next to nothing
    for step in range(2001, 2061):
        guard.note(step, rng.gauss(0.8, 0.3))
        if guard.next_check == step:
            break
    assert guard.next_check is not None


def test_the_level_of_the_start_is_interpolated_between_its_timesteps() -> None:
    guard = Guard(GuardConfig())
    guard.start = Start([1.0], [0.0], [math.log(4.0), math.log(1.0)])

    class Batch:
        levels = (0, 250, 500, 750, 999)

    found = guard.excess({"chosen_mse": torch.tensor([4.0, 4.0, 2.0, 1.0, 2.0])}, Batch(), 1000)["chosen_excess"]  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, torch.tensor([0.0, 0.0, 0.0, 0.0, math.log(2.0)]), atol=1e-6, rtol=0)
    assert Guard(GuardConfig(enabled=False)).excess({"chosen_mse": torch.ones(1)}, Batch(), 1000) == {}  # pyright: ignore[reportArgumentType]


def test_what_the_guard_knows_survives_json() -> None:
    import json

    guard = Guard(GuardConfig(), start_of([1.0]), 1, 2, 30, 40, 50, deque([0.5]), (0.1, 0.2))
    other = Guard(GuardConfig())
    other.load(json.loads(json.dumps(guard.state())))
    assert other == guard


# --- runs ------------------------------------------------------------------------------------------------------------

WILD: dict[str, Any] = {
    "model": {"path": "demo"},
    "data": {"resolution": None, "bucket": False, "held_out": 0.3},
    "optimizer": {"learning_rate": 0.05},
    "training": {"steps": 12, "train_batch_size": 4, "gradient_accumulation_steps": 1},
    "validation": {"every_steps": 4},
    "checkpoint": {"every_steps": 4},
    "export": {"precision": "fp32"},
}


@pytest.fixture(scope="module")
def cartoons(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Ten pairs of scenes that the demo model knows: a random model's errors are near 1, and cannot rise much."""
    folder = tmp_path_factory.mktemp("cartoons")
    records: list[dict[str, Any]] = []
    for i, scene in enumerate(itertools.islice(scenes(7, held_out=False), 10)):
        record = {"prompt": scene.caption}
        for side, style in (("chosen", "cartoon"), ("rejected", "plain")):
            record[side] = str(folder / f"{side}-{i}.png")
            render(scene, style, 64).save(record[side])
        records.append(record)
    return records


@pytest.fixture
def new_cartoon_run(new_run: Run, cartoons: list[dict[str, Any]]) -> Run:
    return functools.partial(new_run, pairs=cartoons)


def of_type(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run.events) if e["type"] == kind]


def chosen_at_the_end(run: RunDir) -> tuple[float, float]:
    measured = of_type(run, "evaluated")
    return measured[-1]["chosen_mse"], measured[-1]["base"]["chosen_mse"]


@pytest.mark.parametrize("method", ["mapo", pytest.param("diffusion_dpo", marks=pytest.mark.slow)])
def test_a_run_that_diverges_is_taken_back_and_ends_near_its_good_state(new_cartoon_run: Run, method: str) -> None:
    settings = {**WILD, "method": {"type": method}}
    wild = new_cartoon_run(f"wild-{method}", **settings, guard={"enabled": False})
    run_here(wild)
    error, base = chosen_at_the_end(wild)
    assert error > 1.5 * base
    assert "chosen_error_rises" in {e["code"] for e in of_type(wild, "warning")}
    tamed = new_cartoon_run(f"tamed-{method}", **settings, guard={"learning_rate_factor": 0.02, "window_steps": 4})
    run_here(tamed)
    back = of_type(tamed, "rolled_back")
    assert back
    assert back[0]["from_step"] > back[0]["step"]
    assert back[0]["learning_rate"] == pytest.approx(0.001)
    assert "lowered to 0.001" in back[0]["message"]
    error, base = chosen_at_the_end(tamed)
    assert error < 1.1 * base
    assert of_type(tamed, "run_finished")
    steps = [e["step"] for e in of_type(tamed, "step")]
    assert steps == list(range(1, 13))  # readers see every step once
    assert run_history(tamed).steps == steps
    rates = {e["step"]: e["learning_rate"] for e in of_type(tamed, "step")}
    assert rates[12] == pytest.approx(0.05 * 0.02 ** len(back))
    assert checkpoint_step(tamed.latest_checkpoint()) == 12  # pyright: ignore[reportArgumentType]


def test_after_the_last_return_the_run_ends_with_the_lora_of_its_good_state(
    new_cartoon_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good up to step 4, and worse whatever the learning rate from there on."""
    real = guarding.held_out_errors

    def errors(*args: Any, **kwargs: Any) -> HeldOutErrors:
        found = real(*args, **kwargs)
        factor = 2.0 if now[0] > 4 else 1.0
        return HeldOutErrors(found.pairs, [c * factor for c in found.chosen], found.rejected, found.draws, found.draw)

    now = [0]
    real_check = guarding.check

    def check(session: Any) -> bool:
        now[0] = session.step
        return real_check(session)

    monkeypatch.setattr(guarding, "held_out_errors", errors)
    monkeypatch.setattr("mapo_core.validation.held_out_errors", errors)
    monkeypatch.setattr(trainer, "check", check)
    settings = {**WILD, "optimizer": {"learning_rate": 1e-4}}
    run = new_cartoon_run("hopeless", **settings, guard={"max_rollbacks": 1})
    run_here(run)
    assert len([e for e in events_with_superseded(run) if e["type"] == "rolled_back"]) == 2
    end = read_events(run.events)[-1]
    assert end["type"] == "run_stopped"
    assert "guard" in end["message"]
    assert end["step"] == 4
    assert (run.path / end["lora"]).exists()
    assert [checkpoint_step(p) for p in run.list_checkpoints()] == [4]
    assert run_status(run).state == "stopped"


def events_with_superseded(run: RunDir) -> list[dict[str, Any]]:
    from mapo_core.runs import EventTail

    return EventTail(run.events).poll()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "checkpoints"), [("mapo", 4), ("mapo", 3), ("diffusion_dpo", 3)])
def test_resuming_after_a_return_is_exact(new_cartoon_run: Run, method: str, checkpoints: int) -> None:
    """Also where measurements and checkpoints fall on different steps, so that the good state is one in another."""
    settings = {**WILD, "checkpoint": {"every_steps": checkpoints}, "method": {"type": method}}
    guard = {"learning_rate_factor": 0.02, "window_steps": 4}
    whole = new_cartoon_run(f"guarded-whole-{method}-{checkpoints}", **settings, guard=guard)
    run_here(whole)
    assert of_type(whole, "rolled_back")
    for stop in (2, 10):
        parts = new_cartoon_run(f"guarded-parts-{method}-{checkpoints}-{stop}", **settings, guard=guard)
        with pytest.MonkeyPatch.context() as patch:
            stop_at(parts, stop, patch)
            run_here(parts)
        run_here(parts)
        a, b = load_all(whole), load_all(parts)
        assert all(torch.equal(a[k], b[k]) for k in a)
        last = [
            [(e["step"], e["rise"]) for e in events_with_superseded(r) if e["type"] == "rolled_back"][-1]
            for r in (whole, parts)
        ]
        assert last[0] == last[1]


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_a_healthy_run_is_never_taken_back(new_cartoon_run: Run, seed: int) -> None:
    settings = {**WILD, "optimizer": {"learning_rate": 1e-3}, "validation": {"every_steps": 2}}
    run = new_cartoon_run(f"healthy-{seed}", seed=seed, **settings, guard={"window_steps": 4})
    run_here(run)
    assert not [e for e in events_with_superseded(run) if e["type"] in ("rolled_back", "warning")]
    error, base = chosen_at_the_end(run)
    assert error < base
    assert list(itertools.chain(e["step"] for e in of_type(run, "evaluated")))[-1] == 12
