"""Which checkpoints are kept, and what a paused run still does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mapo_core.trainer as trainer
import mapo_core.validation as validation
from mapo_core.checkpoints import Snapshot, drop_after, drop_old, load_checkpoint, save_checkpoint
from mapo_core.errors import RunError
from mapo_core.evaluate.held_out import HeldOutErrors
from mapo_core.runs import RunDir, best_step, checkpoint_step, read_events
from mapo_core.sections import CheckpointConfig

from .conftest import Run, run_here


def snapshot(step: int) -> Snapshot:
    return Snapshot.of(step, {"w": torch.full((2,), float(step))}, None, {"state": {}, "param_groups": []}, {})


def steps_of(run: RunDir) -> list[int]:
    return [checkpoint_step(p) for p in run.list_checkpoints()]


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({"keep": 2, "keep_best": False}, [50, 60]),
        ({"keep": 1, "keep_every": 20, "keep_best": False}, [20, 40, 60]),
        ({"keep": 1, "keep_best": True}, [30, 60]),  # 30 has the accuracy of 10 and the larger margin
        ({"keep": 2, "keep_every": 40, "keep_best": True}, [30, 40, 50, 60]),
    ],
)
def test_what_is_kept(config: dict[str, Any], kept: list[int], tmp_path: Any) -> None:
    run = RunDir(tmp_path)
    measured = {10: (0.9, 0.1), 30: (0.9, 0.2), 40: (0.5, 0.9), 99: (1.0, 1.0)}
    for step in range(10, 70, 10):
        save_checkpoint(run, snapshot(step))
        drop_old(run, CheckpointConfig(**config), measured)
        assert steps_of(run)[-1] == step  # the newest is there whatever else goes
    assert steps_of(run) == kept


def test_a_state_within_a_state_is_written_and_read(tmp_path: Any) -> None:
    run = RunDir(tmp_path)
    outer = snapshot(20)
    good = Snapshot.of(10, {"w": torch.ones(2)}, {"0": torch.zeros(1)}, {"state": {}, "param_groups": []}, {"a": 1})
    object.__setattr__(outer, "good", good)
    found = load_checkpoint(save_checkpoint(run, outer)).good
    assert found is not None
    assert (found.step, found.others) == (10, {"a": 1})
    assert found.training is not None
    assert torch.equal(found.lora["w"], torch.ones(2))
    (run.checkpoint_path(20) / "good" / "lora.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match="damaged"):
        load_checkpoint(run.checkpoint_path(20))


def test_going_back_leaves_nothing_above(tmp_path: Any) -> None:
    run = RunDir(tmp_path)
    for step in (10, 20, 30):
        save_checkpoint(run, snapshot(step))
    drop_after(run, 10)
    assert steps_of(run) == [10]


def test_the_best_on_held_out_pairs_outlives_the_newest(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    correct = iter([0, 1, 3, 2, 1])  # of four

    def measure(*args: Any, base: bool, **kwargs: Any) -> HeldOutErrors:
        right = next(correct)
        return HeldOutErrors([0, 1, 2, 3], [0.1] * 4, [0.2] * right + [0.05] * (4 - right), 1, [0] * 4)

    monkeypatch.setattr(validation, "held_out_errors", measure)
    often = {"validation": {"every_steps": 1}, "checkpoint": {"every_steps": 1, "keep": 1}}
    run = new_run("best", **often, guard={"enabled": False})
    run_here(run)
    assert steps_of(run) == [2, 4]
    assert best_step(run) == 2


def test_a_paused_run_saves_and_draws_so_that_it_can_be_tried(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("tried")
    real = trainer.train_step

    def ask(session: Any, group: Any, buckets: Any) -> dict[str, float]:
        if session.step == 2:
            run.request("pause")
            assert session.watcher.pause_requested.wait(5)
        return real(session, group, buckets)

    asked: list[str] = []

    def while_paused(seconds: float) -> None:
        if not asked:
            asked.extend(("save", "sample"))
            run.request("save")
            run.request("sample")
        elif not run.pending():
            run.request("resume")

    monkeypatch.setattr(trainer, "train_step", ask)
    monkeypatch.setattr(trainer.time, "sleep", while_paused)
    run_here(run)
    assert (run.export / "tried-00000002.safetensors").exists()
    assert (run.samples / "step_00000002.png").exists()
    kinds = [e["type"] for e in read_events(run.events)]
    first_step_after = next(i for i, e in enumerate(read_events(run.events)) if e["type"] == "step" and e["step"] == 3)
    between = kinds[kinds.index("sample_saved", kinds.index("paused")) : first_step_after]
    assert "paused" in between  # a page that follows the events still sees a paused run
    assert [e["step"] for e in read_events(run.events) if e["type"] == "step"] == [1, 2, 3, 4]
