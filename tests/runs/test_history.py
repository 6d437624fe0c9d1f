"""What the events say of a run's course, and which run was made for a request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from mapo_core.runs import (
    EventWriter,
    RunDir,
    best_step,
    create_run,
    margin_of,
    remember_request,
    request_key,
    run_history,
    runs_of_request,
)


def emit(run: RunDir, *events: tuple[str, int, dict[str, Any]]) -> None:
    with EventWriter(run) as writer:
        writer.emit("run_started", 0, steps=100, pid=1, process_started=0.0)
        for kind, step, fields in events:
            writer.emit(kind, step, **fields)  # type: ignore[arg-type]


def test_curves_with_the_margin(run: RunDir) -> None:
    emit(
        run,
        ("step", 1, {"loss": 2.0, "chosen_mse": 0.25, "rejected_mse": 0.5}),
        ("step", 2, {"loss": float("nan"), "chosen_mse": 0.5}),
        ("sample_saved", 2, {"path": "samples/a.png"}),
        ("sample_saved", 2, {"path": "samples/a.png"}),
        ("warning", 2, {"message": "look out"}),
        ("evaluated", 2, {"accuracy": 0.5, "margin": 0.1}),
    )
    history = run_history(run)
    assert history.steps == [1, 2]
    assert history.curves["loss"] == [2.0, None]
    assert history.curves["margin"] == [0.25, None]
    assert history.samples == ["samples/a.png"]
    assert history.warnings == ["look out"]
    assert [e["accuracy"] for e in history.evaluated] == [0.5]


def test_a_long_curve_is_averaged(run: RunDir) -> None:
    emit(run, *(("step", n, {"loss": float(n)}) for n in range(1, 11)))
    history = run_history(run, max_points=4)
    assert history.steps == [3, 6, 9, 10]
    assert history.curves["loss"] == [2.0, 5.0, 8.0, 10.0]


def test_an_empty_run_has_no_course(run: RunDir) -> None:
    history = run_history(run)
    assert (history.steps, history.evaluated, history.samples) == ([], [], [])
    assert best_step(run) is None


@pytest.mark.parametrize(
    ("measures", "best"),
    [
        ({}, 30),
        ({10: (0.9, 0.1), 20: (0.8, 0.9)}, 10),
        ({10: (0.9, 0.1), 20: (0.9, 0.2), 30: (0.9, 0.1)}, 20),
        ({10: (0.9, 0.1), 20: (0.9, 0.1)}, 20),
        ({10: (None, None), 20: (0.1, 0.0)}, 20),
        ({15: (1.0, 1.0)}, 30),
    ],
    ids=["no measure", "accuracy", "then margin", "then the later", "not a number", "no checkpoint there"],
)
def test_the_best_checkpoint(run: RunDir, measures: dict[int, Any], best: int) -> None:
    for step in (10, 20, 30):
        (run.checkpoints / f"step_{step:08d}").mkdir(parents=True)
    emit(run, *(("evaluated", s, {"accuracy": a, "margin": m}) for s, (a, m) in measures.items()))
    assert best_step(run) == best


def test_margin_of_a_step_without_a_rejected_error() -> None:
    assert margin_of({"chosen_mse": 0.5}) is None
    assert margin_of({"chosen_mse": 0.5, "rejected_mse": 0.25}) == -0.25


CONFIG = '{"name": "ink", "parent": null, "seed": 0}'


def test_a_request_is_settings_pairs_and_files_but_not_the_name(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    key = request_key(CONFIG, "pairs", [image])
    assert request_key('{"seed": 0, "name": "wash"}', "pairs", [image, image]) == key
    assert request_key(CONFIG.replace("0", "1"), "pairs", [image]) != key
    assert request_key(CONFIG, "other pairs", [image]) != key
    os.utime(image, ns=(1, 1))
    touched = request_key(CONFIG, "pairs", [image])
    assert touched != key
    image.unlink()
    assert request_key(CONFIG, "pairs", [image]) not in (key, touched)


def test_runs_of_a_request_newest_first(home: Path) -> None:
    runs = [create_run(name, "{}", "", home) for name in ("one", "two", "three", "four")]
    for run, key in zip(runs, ("k", "k", "other"), strict=False):
        remember_request(run, key)
    (runs[3].path / "request.json").write_text("not JSON", encoding="utf-8")
    assert sorted(r.name for r in runs_of_request("k", home)) == ["one", "two"]
    assert runs_of_request("nobody", home) == []
