"""The whole way in one browser: two folders, the check, a set, a training, its pictures, and the LoRA file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mapo_core.runs import RunDir, best_step, read_events, run_status

from .test_pages_pairs import field, has
from .test_pages_results import choose, open_results
from .test_train_page import start, wait_state

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

NAME = "journey"
PAIRS, STEPS = 8, 12  # the form warms up for 10


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Demo pairs as two folders of pictures with captions."""
    from mapo_core.demo.run import write_pictures

    return write_pictures(tmp_path_factory.mktemp("folders"), "cartoon", PAIRS)


def test_from_two_folders_to_a_lora_that_loads(
    app: Any, folders: tuple[Path, Path], open_page: Callable[..., Any], show_tab: Any, tmp_path: Path
) -> None:
    page = open_page(app.url)
    bring_in_check_and_save(page, folders)
    train(page, show_tab)
    run = RunDir(app.home / "runs" / NAME)
    assert run_status(run).state == "finished"
    steps = [event["step"] for event in read_events(run.events) if event["type"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    compare(page, show_tab)
    lora = tmp_path / "journey.safetensors"
    download(page, lora)
    check_loads(lora, run)


def bring_in_check_and_save(page: Any, folders: tuple[Path, Path]) -> None:
    for side, folder in zip(("chosen", "rejected"), folders, strict=True):
        page.locator(f"#pairs-{side}-drop input[type=file]").set_input_files(str(folder))
        page.locator(f"#pairs-{side}-drop").get_by_text(f"{PAIRS - 1:04d}-", exact=False).first.wait_for()
    page.locator("#pairs-from-folders").click()
    has(page, f"{PAIRS} pairs")
    field(page, "pairs-res").fill("64")
    page.locator("#pairs-check").click()
    page.locator("#pairs-checked").get_by_text("Checked:").wait_for()
    assert page.locator(".mapo-finding .mapo-badge.error").count() == 0
    field(page, "pairs-name").fill(NAME)
    page.locator("#pairs-save").click()
    page.locator("#pairs-saved").get_by_text(f"{PAIRS} pairs kept").wait_for()


def train(page: Any, show_tab: Any) -> None:
    show_tab(page, "Train")
    choose(page, "train-pairs", NAME)
    start(page, NAME, training__steps=STEPS)
    page.locator("#run-status").get_by_text(NAME, exact=True).wait_for()
    wait_state(page, "finished")
    page.locator("#plot-loss canvas, #plot-loss svg").first.wait_for()


def compare(page: Any, show_tab: Any) -> None:
    open_results(page, show_tab, NAME)
    page.get_by_text("Draw new pictures").click()
    field(page, "results-prompts").fill("a red star, white background")
    page.locator("#results-draw").click()
    page.locator("#results-drawn").get_by_text("Drawn:").wait_for()
    page.wait_for_function("() => document.querySelector('#results-row input').value.includes('strength 1')")
    sides = page.locator("#results-slider img")
    sides.nth(1).wait_for()
    assert sides.nth(0).get_attribute("src") != sides.nth(1).get_attribute("src")


def download(page: Any, path: Path) -> None:
    page.locator("#results-export").click()
    page.locator("#results-exported").get_by_text("read back and compared").wait_for()
    with page.expect_download() as file:
        page.locator("#results-files a[download]").first.click()
    file.value.save_as(path)


def check_loads(path: Path, run: RunDir) -> None:
    """The downloaded file has every key of the checkpoint's LoRA and no other, its weights, and its effect."""
    from mapo_core.export import verify_lora
    from mapo_core.reopen import open_trained

    trained = open_trained(run, best_step(run))
    verify_lora(trained.model, trained.family, path)
    with safe_open(path, "pt") as file:
        up = [key for key in file.keys() if key.endswith(".lora_up.weight")]  # noqa: SIM118
        assert len(up) > 30
        assert any(file.get_tensor(key).abs().max() > 0 for key in up)  # they begin at zero
