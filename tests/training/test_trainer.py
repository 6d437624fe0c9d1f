"""What a run does beside stepping: requests, guards, measures, pictures, files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mapo_core.backward as backward
import mapo_core.trainer as trainer
import mapo_core.validation as validation
from mapo_core.errors import ConfigError, PairsError, RunError, TrainingError
from mapo_core.evaluate.held_out import HeldOutErrors
from mapo_core.export import read_lora
from mapo_core.runs import RunDir, read_events, run_status

from .conftest import Run, lora_of, run_here


def events_of(run: RunDir, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run.events) if e["type"] == kind]


def at_step(step: int, action: Any) -> Any:
    """Wrap train_step so that `action(session)` happens at the beginning of a step."""
    real = trainer.train_step

    def wrapped(session: Any, group: Any, buckets: Any) -> dict[str, float]:
        if session.step == step:
            action(session)
        return real(session, group, buckets)

    return wrapped


def test_a_run_ends_with_everything_that_it_promises(new_run: Run) -> None:
    run = new_run("whole", validation={"every_steps": 2, "sample_every_steps": 2}, checkpoint={"every_steps": 1})
    run_here(run)
    assert [e["step"] for e in events_of(run, "step")] == [1, 2, 3, 4]
    assert [e["step"] for e in events_of(run, "evaluated")] == [0, 2, 4]
    end = read_events(run.events)[-1]
    assert end["type"] == "run_finished"
    assert end["lora"] == f"export/{run.name}.safetensors"
    assert {"accuracy", "margin", "chosen_mse"} <= end["held_out"].keys()
    assert [p.name for p in run.list_checkpoints()] == [f"step_0000000{i}" for i in (2, 3, 4)]  # the newest three
    file = read_lora(run.export / f"{run.name}.safetensors")
    assert file.layout == "kohya"
    assert float(file.metadata["mapo.held_out_accuracy"]) == pytest.approx(end["held_out"]["accuracy"], abs=1e-4)
    for step in (0, 2, 4):
        assert Image.open(run.samples / f"step_{step:08d}.png").size[0] > 100
    assert run_status(run).state == "finished"


def test_held_out_measures_are_the_base_models_before_the_first_step_and_change_after(new_run: Run) -> None:
    run = new_run("measures", optimizer={"learning_rate": 0.05}, validation={"every_steps": 4})
    run_here(run)
    first, *_, last = events_of(run, "evaluated")
    assert first["base"]["margin"] == first["margin"]
    assert last["base"] == first["base"]
    assert last["margin"] != first["margin"]
    assert last["pairs"] == 2
    assert last["draws"] == 2


def test_a_rising_error_on_chosen_images_is_said(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the guard is switched off; test_guard.py has what it does where it is on."""

    def measured(chosen_mse: float) -> Any:
        def measure(*args: Any, base: bool, **kwargs: Any) -> HeldOutErrors:
            return HeldOutErrors([0, 1], [0.1 if base else chosen_mse] * 2, [0.6] * 2, 1, [0, 0])

        return measure

    for name, chosen_mse, warned in (("calm", 0.105, False), ("diverging", 0.12, True)):
        run = new_run(name, validation={"every_steps": 2}, guard={"enabled": False})
        monkeypatch.setattr(validation, "held_out_errors", measured(chosen_mse))
        run_here(run)
        assert ("chosen_error_rises" in {e["code"] for e in events_of(run, "warning")}) == warned


def test_a_stop_before_the_first_step_says_that_there_is_nothing_to_save(new_run: Run) -> None:
    run = new_run("early")

    def ask(run: RunDir) -> None:
        run.request("stop")

    run_here(run, before_training=ask)
    end = read_events(run.events)[-1]
    assert end["type"] == "run_stopped"
    assert "nothing to save" in end["message"]
    assert run.list_checkpoints() == []
    assert not list(run.export.glob("*")) if run.export.exists() else True


def test_save_and_sample_now(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("requests")

    def ask(session: Any) -> None:
        run.request("save")
        run.request("sample")

    monkeypatch.setattr(trainer, "train_step", at_step(2, ask))
    run_here(run)
    assert (run.export / "requests-00000002.safetensors").exists()
    assert run.checkpoint_path(2).exists()
    assert (run.samples / "step_00000002.png").exists()
    assert run.pending() == []


def test_pause_keeps_the_work_and_resume_goes_on(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run("paused")

    def ask(session: Any) -> None:
        run.request("pause")
        assert session.watcher.pause_requested.wait(5)

    def resume_when_paused(seconds: float) -> None:
        if run.latest_checkpoint() is not None and not run.is_pending("pause"):
            run.request("resume")

    monkeypatch.setattr(trainer, "train_step", at_step(2, ask))
    monkeypatch.setattr(trainer.time, "sleep", resume_when_paused)
    run_here(run)
    assert events_of(run, "paused")[0]["step"] == 2
    assert [e["step"] for e in events_of(run, "step")] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_is_skipped_counted_and_after_several_stops_the_run(
    new_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("nonfinite", training={"steps": 10, "max_nonfinite_steps": 3}, checkpoint={"every_steps": 1})
    real = backward.mean_squares
    broken = {3, 5, 6, 7}
    weights: dict[int, dict] = {}

    def errors(*arguments: Any) -> Any:
        found = real(*arguments)
        return found * math.nan if now[0] in broken else found

    now = [0]

    def remember(session: Any, group: Any, buckets: Any) -> dict[str, float]:
        now[0] = session.step
        values = step(session, group, buckets)
        weights[session.step] = {k: v.clone() for k, v in trainer_lora(session).items()}
        return values

    from mapo_core.adapter import lora_state

    def trainer_lora(session: Any) -> dict:
        return lora_state(session.model.unet)

    step = trainer.train_step
    monkeypatch.setattr(backward, "mean_squares", errors)
    monkeypatch.setattr(trainer, "train_step", remember)
    with pytest.raises(TrainingError, match="3 steps in a row"):
        run_here(run)
    assert all(torch.equal(weights[2][k], weights[3][k]) for k in weights[2])  # the broken step changed nothing
    assert any(not torch.equal(weights[3][k], weights[4][k]) for k in weights[3])
    assert len(events_of(run, "warning")) == 4
    assert next(e for e in events_of(run, "step") if e["step"] == 3)["loss"] is None
    assert all(torch.isfinite(v).all() for v in lora_of(run).values())


def test_weights_of_pairs_scale_their_loss(new_run: Run, drawn_pairs: list[dict[str, str]]) -> None:
    losses = []
    for weight in (1.0, 2.0):
        run = new_run(f"weight-{weight}", pairs=[{**r, "weight": weight} for r in drawn_pairs], training={"steps": 1})
        run_here(run)
        losses.append(events_of(run, "step")[0]["loss"])
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-5)


def test_a_second_run_reads_the_cache_and_a_damaged_shard_is_encoded_again(
    new_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    first = new_run("first", training={"steps": 1})
    run_here(first)
    encoded = [e for e in events_of(first, "phase") if e["phase"] == "encoding images"]
    assert encoded[-1]["done"] == encoded[-1]["total"] == 24
    second = new_run("second", training={"steps": 1})
    run_here(second)
    assert not [e for e in events_of(second, "phase") if e["phase"].startswith("encoding")]
    assert events_of(first, "step")[0]["loss"] == events_of(second, "step")[0]["loss"]
    shard = next((tmp_path / "cache" / "latents").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 0xFF  # one bit pattern of one latent
    shard.write_bytes(data)
    third = new_run("third", training={"steps": 1})
    run_here(third)
    assert [e for e in events_of(third, "phase") if e["phase"] == "encoding images"][-1]["total"] == 1
    assert events_of(first, "step")[0]["loss"] == events_of(third, "step")[0]["loss"]


def test_changed_images_are_noticed(new_run: Run, drawn_pairs: list[dict[str, str]], tmp_path: Path) -> None:
    copied = []
    for i, record in enumerate(drawn_pairs):
        path = tmp_path / f"{i}.png"
        path.write_bytes(Path(record["chosen"]).read_bytes())
        copied.append({**record, "chosen": str(path)})
    before = new_run("before", pairs=copied, training={"steps": 1}, method={"type": "sft"})
    run_here(before)
    for record in copied:
        Image.open(record["chosen"]).rotate(180).save(record["chosen"])
    after = new_run("after", pairs=copied, training={"steps": 1}, method={"type": "sft"})
    run_here(after)
    assert events_of(before, "step")[0]["loss"] != events_of(after, "step")[0]["loss"]


@pytest.mark.parametrize("precision", ["bf16"])
def test_lower_precision_keeps_lora_weights_in_float32(new_run: Run, precision: str) -> None:
    run = new_run(precision, training={"precision": precision}, optimizer={"type": "adamw8bit"})
    run_here(run)
    assert all(v.dtype == torch.float32 for v in lora_of(run).values())
    assert events_of(run, "run_finished")
    assert all(math.isfinite(e["loss"]) for e in events_of(run, "step"))


def test_gradient_checkpointing_changes_nothing_but_memory(new_run: Run) -> None:
    losses = []
    for on in (False, True):
        run = new_run(f"checkpointing-{on}", training={"gradient_checkpointing": on})
        run_here(run)
        losses.append([e["loss"] for e in events_of(run, "step")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_wrong_requests_are_clear_errors(new_run: Run) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a CUDA device"):
        run_here(new_run("fp16", training={"precision": "fp16"}))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA"):
            run_here(new_run("cuda", training={"device": "cuda"}))
    empty = new_run("empty")
    empty.pairs.write_text("")
    with pytest.raises(PairsError, match="no pair"):
        run_here(empty)


def test_a_checkpoint_of_other_settings_is_refused(new_run: Run) -> None:
    run = new_run("changed")
    run_here(run)
    config = json.loads(run.config.read_text())
    config["adapter"]["targets"] = ["attention", "feed_forward"]
    config["training"]["steps"] = 8
    run.config.write_text(json.dumps(config))
    with pytest.raises(RunError, match="does not fit"):
        run_here(run)
