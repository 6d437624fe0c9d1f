"""`run_sweep`: every point is a run, trained once, measured once, ranked with intervals, and resumable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mapo_core import ConfigError, MapoError, RunError
from mapo_core import sweep as module
from mapo_core.evaluate import Interval
from mapo_core.runs import EventWriter, RunDir, open_run, run_status
from mapo_core.sweep import Trial, grid_points, rank, run_sweep

from ..training.conftest import run_here

VALUES: dict[str, Any] = {
    "name": "rates",
    "data": {"pairs": "pairs.jsonl", "resolution": 32, "bucket_step": 8, "held_out": 0.3},
    "adapter": {"rank": 2},
    "optimizer": {"type": "adamw", "learning_rate": 1e-3},
    "training": {"steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 1, "device": "cpu"},
    "validation": {"every_steps": 0, "draws": 2, "sample_every_steps": 0, "num_inference_steps": 1},
    "checkpoint": {"every_steps": 0},
}
GRID = {"method.type": ["mapo", "sft"], "optimizer.learning_rate": ["1e-3", "1e-2"]}


def report(accuracy: float, margin: float, win: float) -> dict[str, Any]:
    """As `mapo evaluate` gives it, as far as the sweep reads it."""

    def around(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    held = {
        "base": {"margin": -0.5, "chosen_mse": 0.2},
        "lora": {"chosen_mse": 0.3},
        "accuracy": around(accuracy),
        "margin_gain": around(margin + 0.5),
    }
    return {"held_out": held, "scores": [{"name": "clip", "win_rate": around(win)}], "drift": {"relative": 0.25}}


def test_the_grid_has_every_combination_and_equal_budgets() -> None:
    assert [list(p.values()) for p in grid_points(GRID)] == [
        ["mapo", "1e-3"],
        ["mapo", "1e-2"],
        ["sft", "1e-3"],
        ["sft", "1e-2"],
    ]
    for name in ("training.steps", "data.held_out", "seed", "validation.draws"):
        with pytest.raises(ConfigError, match="same data and steps"):
            grid_points({name: ["1", "2"]})
    with pytest.raises(ConfigError, match="what to vary"):
        grid_points({})
    with pytest.raises(ConfigError, match="give values"):
        grid_points({"method.beta": []})


def test_ranking_breaks_ties_by_margin_and_marks_what_is_not_told_apart() -> None:
    def trial(name: str, accuracy: float, half: float, margin: float) -> Trial:
        measures = {"accuracy": Interval(accuracy, accuracy - half, accuracy + half)}
        return Trial(name, {}, measures | {"margin": Interval(margin, margin, margin)})

    failed = Trial("failed", {}, {}, message="out of memory")
    trials = [trial("far", 0.5, 0.05, 9), failed, trial("near", 0.8, 0.1, 1), trial("a", 0.9, 0.05, 1)]
    ranked = rank([*trials, trial("b", 0.9, 0.05, 2)], "accuracy")
    assert [(t.run, t.like_best) for t in ranked] == [
        ("b", False),
        ("a", True),
        ("near", True),
        ("far", False),
        ("failed", False),
    ]
    assert rank(trials, "margin")[0].run == "far"
    with pytest.raises(MapoError, match="ranked by clip: there are accuracy, margin"):
        rank(trials, "clip")
    with pytest.raises(MapoError, match="out of memory"):
        rank([failed], "accuracy")


def finish(run: RunDir) -> None:
    """Stands in for a training: says that it ended after its two steps."""
    with EventWriter(run) as events:
        events.emit("run_started", 0)
        events.emit("run_finished", 2, lora=None)


@pytest.fixture
def sweep(
    tiny_model: Path, drawn_pairs: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """The sweep with a stand-in for training, and reports by the run's number."""
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    text = "".join(json.dumps(r) + "\n" for r in drawn_pairs[:6])
    counts = {"trained": 0, "measured": 0}

    def measured(name: str, arguments: dict[str, Any], **_: Any) -> dict[str, Any]:
        assert name == "evaluate"
        counts["measured"] += 1
        run = RunDir(Path(arguments["run"]))
        number = int(run.name[-1])
        found = report(accuracy=number / 10, margin=-number, win=1 - number / 10)
        folder = run.evaluation / "step_00000002"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(found), encoding="utf-8")
        return {"evaluation": found}

    def train(run: RunDir, progress: Callable[[int, int], None]) -> None:
        counts["trained"] += 1
        finish(run)

    monkeypatch.setattr(module, "run_job", measured)

    def call(values: dict[str, Any] | None = None, train: Callable[..., None] = train, **others: Any) -> Any:
        own = {**VALUES, "model": {"path": str(tiny_model)}, **(values or {})}
        return run_sweep(own, text, others.pop("grid", GRID), train=train, **others)

    call.counts = counts  # type: ignore[attr-defined]
    return call


def test_every_point_is_a_run_and_is_trained_and_measured_once(sweep: Any, tmp_path: Path) -> None:
    trained: list[str] = []

    def train(run: RunDir, progress: Callable[[int, int], None]) -> None:
        trained.append(run.name)
        run_here(run)

    found = sweep(train=train)
    assert trained == ["rates-01", "rates-02", "rates-03", "rates-04"]
    assert sweep.counts == {"trained": 0, "measured": 4}
    assert [t.run for t in found.trials] == ["rates-04", "rates-03", "rates-02", "rates-01"]
    best = found.trials[0]
    assert best.values == {"method.type": "sft", "optimizer.learning_rate": "1e-2"}
    assert best.measures["accuracy"].value == pytest.approx(0.4)
    assert best.measures["margin"].value == pytest.approx(-4)
    assert best.measures["clip"].value == pytest.approx(0.6)
    assert best.chosen_error == pytest.approx(1.5)
    assert best.drift == 0.25
    config = json.loads(open_run("rates-04").config.read_text(encoding="utf-8"))
    assert (config["method"]["type"], config["optimizer"]["learning_rate"]) == ("sft", 0.01)
    assert all(run_status(open_run(t.run)).step == 2 for t in found.trials)
    text = (tmp_path / "sweeps" / "rates" / "result.txt").read_text(encoding="utf-8")
    assert "ranked by accuracy" in text
    assert "type=sft learning_rate=1e-2" in text
    assert "One seed each" in text
    result = json.loads((tmp_path / "sweeps" / "rates" / "result.json").read_text(encoding="utf-8"))
    assert result["trials"][0]["run"] == "rates-04"

    again = sweep(rank_by="clip")  # nothing is trained or measured again
    assert sweep.counts == {"trained": 0, "measured": 4}
    assert again.trials[0].run == "rates-01"
    sweep(evaluate={"count": 3})  # other measures are taken anew
    assert sweep.counts == {"trained": 0, "measured": 8}


def test_an_interrupted_sweep_goes_on(sweep: Any) -> None:
    calls = 0

    def interrupted(run: RunDir, progress: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        finish(run)

    with pytest.raises(KeyboardInterrupt):
        sweep(train=interrupted)
    found = sweep()
    assert sweep.counts["trained"] == 3
    assert sorted(t.run for t in found.trials) == ["rates-01", "rates-02", "rates-03", "rates-04"]


def test_a_failed_trial_does_not_end_the_sweep(sweep: Any) -> None:
    def failing(run: RunDir, progress: Any) -> None:
        if run.name.endswith("2"):
            raise RunError("out of memory")
        finish(run)

    found = sweep(train=failing)
    assert [t.run for t in found.trials] == ["rates-04", "rates-03", "rates-01", "rates-02"]
    assert found.trials[-1].message == "out of memory"
    assert "rates-02 failed: out of memory" in found.render()


def test_a_setting_of_mapo_alone_needs_no_type(sweep: Any) -> None:
    found = sweep({"method": {"parametrisation": "paper"}}, grid={"method.beta": ["8", "64"]})
    methods = [json.loads(open_run(t.run).config.read_text(encoding="utf-8"))["method"] for t in found.trials]
    assert [(m["type"], m["beta"]) for m in methods] == [("mapo", 64), ("mapo", 8)]


def test_faults_are_said_before_anything_is_trained(sweep: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the grid at optimizer.learning_rate=7: optimizer.learning_rate"):
        sweep(grid={"optimizer.learning_rate": ["1e-3", "7"]})
    assert not (tmp_path / "runs").exists()
    sweep(grid={"adapter.rank": ["1"]})
    with pytest.raises(RunError, match="choose another --name"):
        sweep(grid={"adapter.rank": ["2"]})
