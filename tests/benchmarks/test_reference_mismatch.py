"""The paper in miniature: judges that know what is wanted, a plan without gaps, a report of whatever there is."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import mismatch_report as report
import mismatch_tasks as tasks
import reference_mismatch as harness

from mapo_core.demo.scenes import BACKGROUNDS, render

DRAWINGS: dict[str, tuple[Callable[[tasks.Item], Image.Image], Callable[[tasks.Item], Image.Image]]] = {
    "general": (lambda i: render(tasks.tidy(i.scene)), lambda i: render(i.scene)),
    "culture": (lambda i: tasks.grounded(i.scene), lambda i: render(i.scene)),
    "safety": (lambda i: render(i.scene), lambda i: render(i.scene, "cartoon")),
    "style": (lambda i: render(i.scene, "neon"), lambda i: render(i.scene)),
    "personalisation": (
        lambda i: (
            render(i.scene)
            if i.ordinary
            else tasks.draw_subject(
                tasks.spot_of(i.scene.things[0].place, random.Random(3)), BACKGROUNDS[i.scene.background]
            )
        ),
        lambda i: render(i.scene),
    ),
}


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_judge_tells_what_is_wanted_from_what_the_base_model_draws(name: str) -> None:
    task = tasks.TASKS[name]
    items = task.items("validation")
    asked = np.array([not i.ordinary for i in items])
    wanted, usual = DRAWINGS[name]
    good, right = task.judge([wanted(i) for i in items], items)
    poor, _ = task.judge([usual(i) for i in items], items)
    assert right.mean() == 1
    assert good[asked].mean() > 0.95
    assert poor[asked].mean() < 0.15
    noise = [Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)) for _ in items]
    destroyed, still_right = task.judge(noise, items)
    assert (destroyed * still_right)[asked].mean() < 0.05


@pytest.mark.parametrize("name", tasks.TASKS)
def test_captions_of_the_splits_are_distinct_and_new(name: str) -> None:
    validation, test = ({i.caption for i in tasks.TASKS[name].items(s)} for s in ("validation", "test"))
    assert len(validation) == tasks.COUNTS["validation"]
    assert len(test) == tasks.COUNTS["test"]
    assert not validation & test
    assert not (validation | test) & {p.caption for p in tasks.TASKS[name].pairs()}


def fill(work: Path, value: Callable[[harness.Cell], float]) -> None:
    """Results for every cell of the grid, without training."""
    (work / "cells").mkdir(parents=True)
    for cells in harness.plan(work, list(harness.ORDER), list(harness.GRID)):
        for cell in cells:
            items = [
                {"wanted": value(cell), "right": 1.0, "ordinary": i.ordinary}
                for i in tasks.TASKS[cell.task].items(cell.split)
            ]
            result = {
                **harness.asdict(cell),
                "settings": harness.settings_of(cell),
                "steps": tasks.TASKS[cell.task].steps,
                "batch": harness.BATCH,
                "items": items,
                "seconds": 60,
                "load_average": [1, 2],
                "trained_in_this_cell": cell.method != "base",
                "seconds_per_step": 0.2,
                "fastest_tenth_seconds_per_step": 0.1,
                "peak_memory_bytes": 600 * 2**20,
                "memory_before_bytes": 350 * 2**20,
            }
            (work / "cells" / cell.file_name).write_text(json.dumps(result))


def test_the_plan_has_three_configurations_and_three_seeds_for_every_method(tmp_path: Path) -> None:
    fill(tmp_path, lambda cell: 0.1 * cell.configuration)
    names = {p.name for p in (tmp_path / "cells").iterdir()}
    for method in harness.GRID:
        assert len(harness.GRID[method]) == 3
        for seed in harness.SEEDS:
            assert f"style-{method}-2-seed{seed}-test.json" in names  # the best one on the validation captions
        assert f"style-{method}-0-seed1-test.json" not in names


def test_a_result_of_other_settings_does_not_count(tmp_path: Path) -> None:
    fill(tmp_path, lambda cell: 0.5)
    cell = harness.Cell("style", "sft", 0, 0, "validation")
    assert harness.is_finished(tmp_path, cell)
    path = tmp_path / "cells" / cell.file_name
    found = json.loads(path.read_text())
    found["settings"]["learning_rate"] *= 2
    path.write_text(json.dumps(found))
    assert not harness.is_finished(tmp_path, cell)
    assert harness.cell_of(path) == cell


def test_an_empty_grid_is_reported_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "work" / "cells").mkdir(parents=True)
    report.write_report(tmp_path / "work", tmp_path / "out" / "figures")
    text = (tmp_path / "out" / "figures.md").read_text()
    assert "**The grid is not complete.**" in text
    assert "style, sft: 3 of 3 configurations, so no test score" in text
    assert "too few tasks are complete" in text


def test_a_full_grid_gives_the_figures_that_are_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "RESAMPLES", 20)
    rising = {"general": 0.1, "culture": 0.2, "safety": 0.3, "style": 0.4, "personalisation": 0.5}
    fill(
        tmp_path / "work", lambda c: 0.3 + (rising[c.task] if c.method.startswith("mapo") else 0) + 0.01 * (c.seed > 0)
    )
    out = tmp_path / "figures"
    (out / "mismatch").mkdir(parents=True)
    for task, value in rising.items():
        measured = {"mismatch": {"value": value, "low": value, "high": value}, "raw": value, "beta": 8}
        (out / "mismatch" / f"{task}.json").write_text(json.dumps(measured))
    report.write_report(tmp_path / "work", out)
    record = json.loads((tmp_path / "figures.json").read_text())
    assert record["missing"] == []
    assert record["order"] == list(rising)
    assert record["gains"]["style"]["mapo_paper"]["value"] == pytest.approx(0.4, abs=1e-3)
    assert record["slopes"]["mapo_paper"]["value"] == pytest.approx(1.0, abs=1e-3)
    assert record["large_beta_less_sft"]["culture"]["value"] == pytest.approx(0.2, abs=1e-3)
    text = (tmp_path / "figures.md").read_text()
    assert "mapo_paper: the gain grows; +1.00" in text
    assert "not complete" not in text
    assert len(list((tmp_path / "figures").glob("*.json"))) == len(list((tmp_path / "work" / "cells").iterdir()))
    resumed = tmp_path / "resumed"
    harness.take_over(resumed, out)
    assert len(list((resumed / "cells").iterdir())) == len(list((tmp_path / "work" / "cells").iterdir()))
