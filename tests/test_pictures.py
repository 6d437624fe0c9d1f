"""Charts, sheets of pairs and reports: not empty, of the size that was asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mapo_core import build_config, contact_sheet, pair_sheet, run_chart, run_report
from mapo_core.charts import _COLOURS
from mapo_core.pairs import PreferencePair
from mapo_core.runs import EventWriter, RunDir, create_run


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    config = build_config({"name": "ink", "model": {"path": "demo"}, "data": {"pairs": "p.jsonl"}, "seed": 7})
    return create_run("ink", config.to_json(), "", tmp_path)


def record(run: RunDir, steps: int, base: bool = True) -> None:
    with EventWriter(run) as events:
        events.emit("run_started", 0, steps=steps, pid=1, process_started=0.0)
        for step in range(1, steps + 1):
            events.emit("step", step, loss=1 / step, chosen_mse=0.1, rejected_mse=0.1 + step / 100)
        measures: dict[str, Any] = {"accuracy": 0.75, "margin": 0.1, "chosen_mse": 0.1, "rejected_mse": 0.2}
        if base:
            measures["base"] = {"accuracy": 0.25, "margin": -0.1, "chosen_mse": 0.2, "rejected_mse": 0.1}
        events.emit("evaluated", steps, **measures)
        events.emit("warning", steps, message="the error on chosen images rises")
        events.emit("run_finished", steps)


def colours(image: Image.Image) -> set[Any]:
    return {colour for _, colour in image.getcolors(1_000_000) or ()}


@pytest.mark.parametrize("steps", [1, 20, 100])
def test_a_chart_shows_its_curves(run: RunDir, steps: int) -> None:
    record(run, steps)
    chart = run_chart(run, 400, 300)
    assert chart.size == (400, 300)
    assert {_COLOURS["loss"], _COLOURS["margin"], _COLOURS["accuracy"], _COLOURS["base"]} <= colours(chart)


def test_a_chart_of_nothing_says_so(run: RunDir) -> None:
    empty = run_chart(run)
    assert empty.size == (900, 720)
    record(run, 3)
    assert run_chart(run).tobytes() != empty.tobytes()


def test_a_chart_of_equal_values_has_room(run: RunDir) -> None:
    with EventWriter(run) as events:
        for step in range(1, 4):
            events.emit("step", step, loss=0.0)
    assert _COLOURS["loss"] in colours(run_chart(run))


def test_a_report_names_measures_warnings_and_what_was_changed(run: RunDir) -> None:
    record(run, 5)
    text = run_report(run)
    assert text.startswith("ink: finished, step 5 of 5")
    assert "accuracy                 0.2500     0.7500" in text
    assert "the error on chosen images rises" in text
    assert "seed = 7" in text
    assert "LoRA: none yet" in text
    assert str(run.path) in text


def test_a_report_of_a_run_that_has_not_begun(run: RunDir) -> None:
    assert "Held-out pairs: not measured." in run_report(run)


def made(tmp_path: Path, count: int) -> list[PreferencePair]:
    pairs = []
    for n in range(count):
        paths = [tmp_path / f"{n}{side}.png" for side in "cr"]
        for path, colour in zip(paths, ("green", "red"), strict=True):
            Image.new("RGB", (40 + n, 20), colour).save(path)
        pairs.append(PreferencePair(prompt=f"p {n}", chosen=paths[0], rejected=paths[1], source="x"))
    return pairs


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (5, 5), (30, 8)])
def test_a_sheet_of_pairs_has_a_column_for_each_up_to_eight(tmp_path: Path, count: int, shown: int) -> None:
    sheet = pair_sheet(made(tmp_path, count), tile=60)
    assert sheet.size == (110 + shown * 66, 24 + 2 * 66)
    assert sheet.getpixel((110 + 30, 24 + 30)) == (0, 128, 0)
    assert sheet.getpixel((110 + 30, 24 + 66 + 30)) == (255, 0, 0)


def test_a_contact_sheet_without_words() -> None:
    picture = Image.new("RGB", (64, 64), "blue")
    assert contact_sheet([[picture] * 3] * 2, tile=128).size == (6 + 3 * 134, 6 + 2 * 134)
