"""The Results and Evaluate pages in a browser, on a run of the demo model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mapo_core.runs import RunDir, run_status

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]
RUN = "shown run"
STEPS = 20
LONG_MS = 300_000


@pytest.fixture(scope="module")
def trained(app: Any) -> str:
    """A short run of the demo model in the app's home, with pictures and two checkpoints."""
    from mapo_core import build_config, demo_pairs, demo_values, merge_settings
    from mapo_core.pairs import pairs_text
    from mapo_core.runs import create_run, start_run

    short = {
        "training": {"train_batch_size": 4},
        "validation": {"every_steps": 10, "sample_every_steps": 10, "draws": 1, "num_inference_steps": 4},
        "checkpoint": {"every_steps": 10},
    }
    config = build_config(merge_settings(demo_values(RUN, steps=STEPS), short))
    pairs = demo_pairs("cartoon", home=app.home).pairs[:16]
    run = create_run(RUN, config.to_json(), pairs_text(pairs), app.home)
    assert start_run(run, "detached").wait(280).state == "finished"
    return RUN


def choose(page: Any, name: str, text: str) -> None:
    page.locator(f"#{name} input").first.click()
    page.get_by_role("option", name=text).first.click()


def field(page: Any, name: str) -> Any:
    return page.locator(f"#{name} textarea, #{name} input").first


def open_results(page: Any, show_tab: Any, name: str) -> None:
    show_tab(page, "Results")
    page.locator("#results-refresh").click()
    choose(page, "results-run", name)
    page.locator("#results-figures").get_by_text("held-out pair accuracy").wait_for()


def test_base_and_lora_side_by_side(app: Any, trained: str, open_page: Callable[..., Any], show_tab: Any) -> None:
    page = open_page(app.url)
    open_results(page, show_tab, trained)
    page.locator("#results-slider img").nth(1).wait_for()
    first = [page.locator("#results-slider img").nth(i).get_attribute("src") for i in range(2)]
    assert len(set(first)) == 2
    choose(page, "results-prompt", "2.")
    page.wait_for_function(
        "src => document.querySelector('#results-slider img').getAttribute('src') !== src", arg=first[0]
    )
    page.get_by_text("Draw new pictures").click()
    field(page, "results-prompts").fill("a red star, white background")
    field(page, "results-strengths").fill("0.5, 1.0")
    page.locator("#results-draw").click()
    page.locator("#results-drawn").get_by_text("Drawn:").wait_for()
    page.locator("#results-comparison input").first.wait_for()
    page.wait_for_function("() => document.querySelector('#results-row input').value.includes('strength 1')")
    choose(page, "results-row", "strength 0.5")


def test_the_lora_file_that_is_downloaded_loads(
    app: Any, trained: str, open_page: Callable[..., Any], show_tab: Any, tmp_path: Path
) -> None:
    from safetensors import safe_open

    page = open_page(app.url)
    open_results(page, show_tab, trained)
    page.locator("#results-copy").click()
    page.get_by_text("Make the LoRA file first").first.wait_for()
    page.locator("#results-export").click()
    page.locator("#results-exported").get_by_text("read back and compared").wait_for()
    with page.expect_download() as download:
        page.locator("#results-files a[download]").first.click()
    path = tmp_path / "lora.safetensors"
    download.value.save_as(path)
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
        assert file.metadata()["ss_network_module"]
    assert len(keys) > 100
    assert all(re.search(r"\.(lora_down\.weight|lora_up\.weight|alpha)$", key) for key in keys)
    card = (app.home / "runs" / trained / "export" / "README.md").read_text(encoding="utf-8")
    assert "16 pairs" in card
    loras = tmp_path / "loras"
    field(page, "results-folder").fill(str(loras))
    page.locator("#results-copy").click()
    page.locator("#results-copied").get_by_text("Load LoRA").wait_for()
    assert [p.read_bytes() for p in loras.iterdir()] == [path.read_bytes()]


def test_pairs_are_looked_at_and_the_run_goes_on_without_one(
    app: Any, trained: str, open_page: Callable[..., Any], show_tab: Any
) -> None:
    from mapo_core import load_settings, read_inspection
    from mapo_core.pairs import read_pairs

    run = RunDir(app.home / "runs" / trained)
    page = open_page(app.url)
    open_results(page, show_tab, trained)
    choose(page, "results-step", f"step {STEPS}")
    page.locator("#inspect-classes").get_by_text("not been measured yet").wait_for()
    field(page, "inspect-draws").fill("3")
    page.locator("#inspect-go").click()
    page.locator("#cancel-inspect").click()
    page.locator("#inspect-busy").get_by_text("Stopped: inspect").wait_for()
    assert read_inspection(run, STEPS) is None
    page.locator("#inspect-go").click()
    page.locator("#inspect-busy").get_by_text("Measured 16 of 16 pairs").wait_for()
    found = read_inspection(run, STEPS)
    assert found is not None
    numbers = [pair["index"] for pair in found["pairs"]]
    cells = page.locator("#inspect-table [role=gridcell]").locator("visible=true")
    cells.get_by_text(found["pairs"][0]["verdict"], exact=True).first.wait_for()
    pictures = page.locator("#inspect-pictures")
    pictures.get_by_text(f"Pair {numbers[0]}", exact=True).wait_for()

    cells.get_by_text(found["pairs"][1]["prompt"]).first.click()
    pictures.get_by_text(f"Pair {numbers[1]}", exact=True).wait_for()
    assert pictures.locator("img").count() == 2
    page.locator("#inspect-turn").click()
    page.locator("#inspect-flip").get_by_text(f"{numbers[1]} · ").wait_for()
    page.locator("#inspect-drop").click()  # one or the other
    page.locator("#inspect-exclude").get_by_text(f"{numbers[1]} · ").wait_for()
    page.locator("#inspect-flip").get_by_text(f"{numbers[1]} · ").wait_for(state="detached")
    choose(page, "inspect-flip", f"{numbers[2]} · ")
    field(page, "inspect-name").fill("gone on")
    field(page, "inspect-steps").fill("2")
    page.locator("#inspect-train").click()
    page.locator("#inspect-started").get_by_text("gone on starts.").wait_for()
    show_tab(page, "Train")
    page.locator("#run-status").get_by_text("gone on", exact=True).wait_for()
    page.wait_for_function("() => document.querySelector('#run-status .mapo-badge')?.textContent === 'finished'")

    new = RunDir(app.home / "runs" / "gone on")
    values = load_settings(new.config)
    assert (values["parent"], values["training"]["steps"]) == (f"{trained}@{STEPS}", 2)
    before, after = read_pairs(run.pairs), read_pairs(new.pairs)
    assert len(after) == len(before) - 1
    assert before[numbers[1]].chosen not in [p.chosen for p in after]
    assert before[numbers[2]].chosen in [p.rejected for p in after]


def test_scorers_are_listed_and_the_demos_measure_a_run(
    app: Any, trained: str, open_page: Callable[..., Any], show_tab: Any
) -> None:
    page = open_page(app.url)
    show_tab(page, "Evaluate")
    choose(page, "evaluate-run", trained)
    field(page, "evaluate-count").fill("2")
    page.locator("#evaluate-go").click()
    page.locator("#evaluate-table").get_by_text("held-out pair accuracy").wait_for()
    for words in ("drift on other prompts", "diversity across seeds"):
        assert page.locator("#evaluate-table").get_by_text(words).is_visible()
    page.locator("#evaluate-sheet img").wait_for()
    page.get_by_role("tab", name="Scorers").click()
    page.locator("#scorers-table").get_by_text("demo-style").wait_for()
    assert "hf download" in page.locator("#scorers-table").inner_text()
    open_results(page, show_tab, trained)
    page.locator("#results-figures").get_by_text("drift on other prompts").wait_for()


def test_a_long_measure_is_cancelled(app: Any, open_page: Callable[..., Any], show_tab: Any) -> None:
    page = open_page(app.url)
    show_tab(page, "Evaluate")
    page.get_by_role("tab", name="First beta").click()
    field(page, "mismatch-count").fill("400")
    page.locator("#mismatch-go").click()
    page.locator("#mismatch-busy .mapo-bar").wait_for()
    page.locator("#cancel-mismatch").click()
    page.locator("#mismatch-busy").get_by_text("Stopped: mismatch").wait_for()
    page.locator("#cancel-mismatch").wait_for(state="hidden")


def test_a_grid_that_cannot_be_is_refused_at_once(app: Any, open_page: Callable[..., Any], show_tab: Any) -> None:
    page = open_page(app.url)
    show_tab(page, "Evaluate")
    page.get_by_role("tab", name="Sweep").click()
    field(page, "sweep-grid").fill("training.steps=1,2")
    page.locator("#sweep-go").click()
    page.get_by_text("all trials have the same data and steps").first.wait_for()
    field(page, "sweep-grid").fill("method.beta")
    page.locator("#sweep-go").click()
    page.get_by_text("write a setting and its values").first.wait_for()


def test_a_small_sweep_is_ranked(app: Any, few: str, open_page: Callable[..., Any], show_tab: Any) -> None:
    """With real trainings of two steps each, on a few pairs."""
    page = open_page(app.url)
    show_tab(page, "Evaluate")
    page.get_by_role("tab", name="Sweep").click()
    choose(page, "sweep-pairs", few)
    field(page, "sweep-name").fill("small")
    field(page, "sweep-grid").fill("method.beta=4, 400")
    field(page, "sweep-steps").fill("2")
    page.locator("#sweep-go").click()
    page.locator("#sweep-busy").get_by_text(re.compile("trial 1 of 2")).wait_for()
    page.locator("#sweep-busy").get_by_text("Done.").wait_for(timeout=LONG_MS)
    rows = page.locator("#sweep-table tbody tr").all_inner_texts()
    assert [row.split()[:2] for row in rows] in (
        [["1", "beta=4"], ["2", "beta=400"]],
        [["1", "beta=400"], ["2", "beta=4"]],
    )
    for name in ("small-01", "small-02"):
        run = RunDir(app.home / "runs" / name)
        assert run_status(run).state == "finished"
        assert any(name in row for row in rows)
        assert run_status(run).step == 2


def test_a_suggested_beta_goes_into_the_form(app: Any, open_page: Callable[..., Any], show_tab: Any) -> None:
    page = open_page(app.url)
    show_tab(page, "Evaluate")
    page.get_by_role("tab", name="First beta").click()
    page.locator("#tab-evaluate").get_by_text("heuristic", exact=False).first.wait_for()
    field(page, "mismatch-count").fill("3")
    page.locator("#mismatch-go").click()
    page.locator("#mismatch-use").wait_for()
    beta = float(field(page, "mismatch-beta").input_value())
    page.locator("#mismatch-use").click()
    page.get_by_text("Advanced: every setting").click()
    page.get_by_text("Method: mapo", exact=True).click()
    page.wait_for_function(
        "beta => Number(document.querySelector('#set-method-mapo-beta input')?.value) === beta", arg=beta
    )
    assert page.locator("#set-method-mapo-parametrisation input").first.input_value() == "paper"
