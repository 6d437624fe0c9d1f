"""`evaluate_run` on tiny runs: what it measures, writes, keeps and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mapo_core import ConfigError, RunError
from mapo_core.cli import main
from mapo_core.errors import MissingWeightsError
from mapo_core.evaluate import (
    EvaluationSettings,
    choose_scorers,
    evaluate_run,
    missing_weights,
    read_evaluation,
    scorers,
)
from mapo_core.evaluate.drift import measure_drift
from mapo_core.reopen import open_trained
from mapo_core.runs import RunDir, read_events, run_job

from ..training.conftest import run_here

Run = Callable[..., RunDir]


class Brightness:
    """A stand-in scorer: mean value of the picture, minus the length of the prompt."""

    name = title = "brightness"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return [float(np.asarray(i).mean()) - len(p) for i, p in zip(images, prompts, strict=True)]


@pytest.fixture
def brightness(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer of that name, loaded as the others are."""
    import sys
    from types import ModuleType

    module: Any = ModuleType("mapo_core.evaluate.brightness")
    module.SOURCES = ()
    module.load = lambda name, options: Brightness()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(scorers.SCORERS, "brightness", "brightness")


@pytest.fixture
def trained(new_run: Run) -> RunDir:
    run = new_run("evaluated", training={"steps": 4}, data={"held_out": 0.3}, validation={"draws": 2})
    run_here(run)
    return run


SETTINGS = EvaluationSettings(scorers=("brightness",), count=3, seeds=2, outside=("a castle", "a cat"))


def test_everything_is_measured_and_written(brightness: None, trained: RunDir) -> None:
    phases: list[str] = []
    steps: list[tuple[int, int]] = []
    found = evaluate_run(trained, SETTINGS, progress=lambda *d: steps.append(d), phase=phases.append)
    folder = trained.evaluation / "step_00000004"
    assert read_evaluation(trained) == json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert read_evaluation(trained, 3) is None
    assert all(done <= total for done, total in steps)
    assert phases[0] == "loading the model"
    assert "scoring with brightness" in phases

    # held-out pairs: exactly the figures that the run itself ended with
    end = next(e for e in reversed(read_events(trained.events)) if e["type"] == "run_finished")
    assert found.held_out is not None
    assert found.held_out.lora.as_dict() == pytest.approx(end["held_out"], rel=1e-5)
    assert found.held_out.base.as_dict() == pytest.approx(end["held_out_base"], rel=1e-5)
    gain = found.held_out.accuracy.value - found.held_out.accuracy_base.value
    assert found.held_out.accuracy_gain.value == pytest.approx(gain)

    # scores: of the pictures that were kept
    assert found.drift is not None
    assert found.drift.prompts == 2
    assert found.drift.distance.value > 0
    score = found.scores[0]
    pictures = [sorted((folder / "pictures" / side).glob("*.png")) for side in ("base", "lora")]
    assert [len(p) for p in pictures] == [6 + 2, 6]  # the drift's base pictures, too
    assert score.pictures == 6
    values = [np.asarray(Image.open(p).convert("RGB")).mean() for p in pictures[1]]
    lengths = [len(p) for p in found.prompts for _ in range(2)]
    assert score.lora.value == pytest.approx(np.mean(values) - np.mean(lengths), rel=1e-6)
    assert "diversity" in found.not_measured
    assert "hf download facebook/dinov2-base" in found.not_measured["diversity"]

    sheet = Image.open(trained.path / found.sheet)
    assert sheet.height > 2 * 32
    text = (folder / "report.txt").read_text(encoding="utf-8")
    assert "held-out pair accuracy" in text
    assert "not measured: diversity" in text


def test_pictures_are_drawn_once(brightness: None, trained: RunDir) -> None:
    first = evaluate_run(trained, SETTINGS)
    files = {p: p.stat().st_mtime_ns for p in trained.evaluation.rglob("pictures/*/*.png")}
    next(p for p in files if p.parent.name == "lora").unlink()
    again = evaluate_run(trained, SETTINGS)
    assert again.scores == first.scores
    now = {p: p.stat().st_mtime_ns for p in trained.evaluation.rglob("pictures/*/*.png")}
    assert now.keys() == files.keys()
    assert sum(now[p] != files[p] for p in files) == 1


def test_a_lora_that_does_nothing_changes_nothing(brightness: None, new_run: Run) -> None:
    """A learning rate too small to move a weight: base and LoRA draw the same, so every comparison is a tie."""
    run = new_run("nothing", training={"steps": 1}, optimizer={"learning_rate": 1e-30}, data={"held_out": 0.0})
    run_here(run)
    found = evaluate_run(run, SETTINGS)
    assert found.held_out is None
    assert "held none out" in found.not_measured["held-out pairs"]
    assert found.prompts == ("a castle", "a cat")
    assert found.prompts_from == "outside the training set"
    score = found.scores[0]
    assert (score.win_rate.value, score.difference.value) == (0.5, 0)
    assert found.drift is not None
    assert found.drift.distance.value < 1e-10
    assert found.drift.base_error > 0.01


def test_drift_by_a_second_way(trained: RunDir) -> None:
    """Against the two networks run one after the other, in float64 sums."""
    from mapo_core.adapter import adapter_off
    from mapo_core.families.base import ImageGeometry
    from mapo_core.noising import seed_of

    opened = open_trained(trained)
    model, family = opened.model, opened.family
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    embed = family.encode_prompts(model, ["a castle"])[0]
    found = measure_drift(model, family, [picture], [embed], [embed], draws=3, seed=5)

    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    x0, _ = family.encode_images(model, pixels)
    generator = torch.Generator().manual_seed(seed_of(5, "drift", 0))
    noise = torch.randn((3, *x0.shape[1:]), generator=generator)
    squares: list[float] = []
    errors: list[float] = []
    geometry = ImageGeometry((32, 32), (0, 0), (32, 32))
    for d, t in enumerate((166, 500, 833)):
        alpha = model.noise_scheduler.alphas_cumprod[t]
        noisy = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise[d : d + 1]
        conditions = family.batch_conditions([embed], [geometry])
        with torch.no_grad():
            tuned = family.predict(model, noisy, torch.tensor([t]), conditions)
            with adapter_off(model.unet):
                base = family.predict(model, noisy, torch.tensor([t]), conditions)
        squares.append((tuned - base).double().pow(2).mean().item())
        errors.append((base - noise[d : d + 1]).double().pow(2).mean().item())
    assert found.distance.value == pytest.approx(np.mean(squares), rel=1e-4)
    assert found.base_error == pytest.approx(np.mean(errors), rel=1e-4)
    assert found.relative == pytest.approx(np.mean(squares) / np.mean(errors), rel=1e-4)


def test_what_was_asked_for_and_cannot_be_measured_is_an_error_before_anything_is_drawn(trained: RunDir) -> None:
    with pytest.raises(MissingWeightsError, match="hf download yuvalkirstain/PickScore_v1"):
        evaluate_run(trained, EvaluationSettings(scorers=("pickscore",)))
    with pytest.raises(ConfigError, match="no scorer 'pick'"):
        evaluate_run(trained, EvaluationSettings(scorers=("pick",)))
    with pytest.raises(ConfigError, match="demo model's pictures alone"):
        evaluate_run(trained, EvaluationSettings(scorers=("demo-style",)))
    with pytest.raises(RunError, match="no checkpoint of step 3"):
        evaluate_run(trained, EvaluationSettings(step=3))
    assert not trained.evaluation.exists()


def test_auto_takes_the_scorers_whose_weights_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    assert choose_scorers(["auto"], "demo") == (["demo-style", "demo-content"], {})
    names, lacking = choose_scorers(["auto"], "sdxl.safetensors")
    assert names == []
    assert set(lacking) == {"aesthetic", "hpsv2", "pickscore", "siglip", "clip", "dinov2"}
    folder = tmp_path / "models" / "pickscore"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert "model" in (missing_weights("pickscore") or "")
    (folder / "model.safetensors").write_bytes(b"")
    assert missing_weights("pickscore") is None
    assert choose_scorers(["auto"], "sdxl.safetensors")[0] == ["pickscore"]


def test_evaluate_on_the_command_line(
    brightness: None, trained: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"anime": ["a red hat"], "photo": [{"prompt": "a boat"}]}), encoding="utf-8")
    command = ["evaluate", str(trained.path), "--scorers", "brightness", "--prompts", str(prompts), "--seeds", "1"]
    out = tmp_path / "report.json"
    assert main([*command, "--outside", str(prompts), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    values = json.loads(out.read_text(encoding="utf-8"))
    assert values["prompts"] == ["a red hat", "a boat"]
    assert values["not_measured"]["diversity"] == "it needs at least two seeds per prompt"
    assert "win rate" in printed
    assert values["sheet"] in printed
    assert main(["evaluate", str(trained.path), "--weights", "dinov2"]) == 1
    assert "NAME=FOLDER" in capsys.readouterr().err
    with pytest.raises(RunError, match="no checkpoint of step 99"):
        run_job("evaluate", {"run": str(trained.path), "step": 99, "scorers": ["auto"]})
