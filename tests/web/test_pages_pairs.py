"""The Pairs page in a browser: from two folders to a saved set, with the check, edits and undo."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.browser
COUNT = 8


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `chosen` (with captions but for one) and `rejected`; the pair of 0001 is the same picture twice."""
    from mapo_core.demo.run import write_pictures

    folder = tmp_path_factory.mktemp("pictures")
    chosen, rejected = write_pictures(folder, "cartoon", COUNT)
    first = sorted(chosen.glob("*.png"))
    first[2].with_suffix(".txt").unlink()
    (rejected / first[1].name).write_bytes(first[1].read_bytes())
    return folder


def sets(home: Path, name: str) -> list[dict[str, Any]]:
    text = (home / "sets" / name / "pairs.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def field(page: Any, name: str) -> Any:
    return page.locator(f"#{name} textarea, #{name} input").first


def summary(page: Any) -> Any:
    return page.locator("#pairs-summary")


def has(page: Any, words: str) -> None:
    summary(page).get_by_text(re.compile(words)).first.wait_for()


def test_two_dropped_folders_become_a_checked_set(app: Any, open_page: Callable[..., Any], pictures: Path) -> None:
    page = open_page(app.url)
    page.locator("#pairs-chosen-drop input[type=file]").set_input_files(str(pictures / "chosen"))
    page.locator("#pairs-rejected-drop input[type=file]").set_input_files(str(pictures / "rejected"))
    for name in ("pairs-chosen-drop", "pairs-rejected-drop"):
        page.locator(f"#{name}").get_by_text("0007-", exact=False).first.wait_for()
    page.locator("#pairs-from-folders").click()
    has(page, f"{COUNT} pairs")
    has(page, "1 without a caption")
    assert page.locator("#card-0 img").count() == 2
    field(page, "pairs-res").fill("64")
    page.locator("#pairs-check").click()
    finding = page.locator(".mapo-finding", has_text="chosen and rejected are the same picture").first
    finding.wait_for()
    assert finding.locator("img").count() == 2
    finding.get_by_role("button", name="Exclude 1 pair").click()
    has(page, "1 excluded")
    field(page, "pairs-name").fill("from browser")
    page.locator("#pairs-save").click()
    page.locator("#pairs-saved").get_by_text("7 pairs kept").wait_for()
    kept = sets(app.home, "from browser")
    assert len(kept) == COUNT - 1
    assert all(Path(p["chosen"]).exists() and str(app.home) in p["chosen"] for p in kept)


def test_captions_swaps_and_marks_with_undo_outlive_the_page(
    app: Any, open_page: Callable[..., Any], pictures: Path
) -> None:
    before = {p: p.read_bytes() for p in pictures.rglob("*.*")}
    page = open_page(app.url)
    field(page, "pairs-chosen").fill(str(pictures / "chosen"))
    field(page, "pairs-rejected").fill(str(pictures / "rejected"))
    page.locator("#pairs-from-folders").click()
    caption = field(page, "card-0-caption")
    caption.wait_for()
    original = caption.input_value()
    caption.fill("words of mine")
    caption.press("Tab")
    page.locator("#pairs-undo:not([disabled])").wait_for()
    picture = page.locator("#card-1 img").first.get_attribute("src")
    page.locator("#card-1-swap").click()
    page.wait_for_function("src => document.querySelector('#card-1 img').getAttribute('src') !== src", arg=picture)
    page.locator("#card-2-held input").check()
    has(page, "1 marked as held out")
    page.locator("#card-3-drop").click()
    has(page, "1 excluded")
    page.locator("#pairs-undo").click()
    has(page, "0 excluded")
    page.locator("#pairs-redo").click()
    has(page, "1 excluded")
    page.reload()
    has(page, "1 excluded")  # the browser remembers which set was edited, the disk how
    assert field(page, "card-0-caption").input_value() == "words of mine"
    for _ in range(4):
        page.locator("#pairs-undo:not([disabled])").click()
        page.wait_for_timeout(50)
    page.wait_for_function("words => document.querySelector('#card-0-caption textarea').value === words", arg=original)
    assert {p: p.read_bytes() for p in pictures.rglob("*.*")} == before


def test_a_zip_and_a_saved_set_are_opened(
    app: Any, open_page: Callable[..., Any], pictures: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in pictures.rglob("*.*"):
            out.write(path, path.relative_to(pictures))
    page = open_page(app.url)
    page.get_by_role("tab", name="Archive or list").click()
    page.locator("#pairs-file-drop input[type=file]").set_input_files(str(archive))
    page.locator("#pairs-file-drop").get_by_text("set.zip").first.wait_for()
    page.locator("#pairs-from-file").click()
    has(page, f"{COUNT} pairs.*set")
    field(page, "pairs-name").fill("zipped")
    page.locator("#pairs-save").click()
    page.locator("#pairs-saved").get_by_text("8 pairs kept").wait_for()
    page.locator("#pairs-save").click()  # again: a set of that name is not replaced unasked
    page.get_by_text("There is a set named zipped already").first.wait_for()
    page.get_by_text("Bring pairs in").click()
    page.get_by_role("tab", name="Saved set").click()
    page.locator("#pairs-from-set").click()
    has(page, "from set zipped")


def test_lists_are_opened(app: Any, open_page: Callable[..., Any], pictures: Path, tmp_path: Path) -> None:
    """A CSV and a parquet file, named by their path."""
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    files = [sorted((pictures / side).glob("*.png"))[:3] for side in ("chosen", "rejected")]
    rows = [("first", files[0][0], files[1][0]), ("second", files[0][2], files[1][2])]
    lines = ["prompt,chosen,rejected", *(",".join(map(str, row)) for row in rows)]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    table = {
        "caption": ["third"],
        "jpg_0": [files[0][0].read_bytes()],
        "jpg_1": [files[1][0].read_bytes()],
        "label_0": [1.0],
        "label_1": [0.0],
    }
    parquet.write_table(arrow.table(table), tmp_path / "pick.parquet")
    page = open_page(app.url)
    page.get_by_role("tab", name="Archive or list").click()
    for name, prompts in (("list.csv", ["first", "second"]), ("pick.parquet", ["third"])):
        if not field(page, "pairs-file-path").is_visible():
            page.get_by_text("Bring pairs in").first.click()
        field(page, "pairs-file-path").fill(str(tmp_path / name))
        page.locator("#pairs-from-file").click()
        has(page, f"{len(prompts)} pairs?.* from {name}")
        for k, prompt in enumerate(prompts):
            page.wait_for_function(
                "at => document.querySelector(`#card-${at[0]}-caption textarea`)?.value === at[1]", arg=[k, prompt]
            )
        page.wait_for_function(f"() => document.querySelectorAll('[id^=card-] img').length === {2 * len(prompts)}")


def test_one_folder_gets_its_rejected_images_drawn(app: Any, open_page: Callable[..., Any], pictures: Path) -> None:
    """With the real job: the demo model draws two pictures in two steps."""
    folder = pictures / "two alone"
    folder.mkdir()
    for path in sorted((pictures / "chosen").glob("000[45]-*")):
        (folder / path.name).write_bytes(path.read_bytes())
    page = open_page(app.url)
    page.get_by_role("tab", name="One folder").click()
    field(page, "pairs-single").fill(str(folder))
    field(page, "pairs-draw-steps").fill("2")
    page.locator("#pairs-generate").click()
    page.locator("#pairs-busy").get_by_text("Drawn into").wait_for()
    has(page, "2 pairs.*two alone")
    captions = [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))]
    assert [field(page, f"card-{k}-caption").input_value() for k in range(2)] == captions
    sources = [image.get_attribute("src") for image in page.locator("#card-0 img, #card-1 img").all()]
    assert len(set(sources)) == 4
    field(page, "pairs-name").fill("half drawn")
    page.locator("#pairs-save").click()
    page.locator("#pairs-saved").get_by_text("2 pairs kept").wait_for()
    kept = sets(app.home, "half drawn")
    assert [Path(pair["chosen"]).parent for pair in kept] == [folder, folder]
    for pair in kept:
        with Image.open(pair["rejected"]) as drawn, Image.open(pair["chosen"]) as chosen:
            assert drawn.size == chosen.size
            assert drawn.convert("RGB").getextrema() != chosen.convert("RGB").getextrema()


def test_what_goes_wrong_is_said_without_a_trace(app: Any, open_page: Callable[..., Any], tmp_path: Path) -> None:
    page = open_page(app.url)
    field(page, "pairs-chosen").fill(str(tmp_path / "nowhere"))
    field(page, "pairs-rejected").fill("file:///etc")
    page.locator("#pairs-from-folders").click()
    page.get_by_text("is an address").first.wait_for()
    field(page, "pairs-rejected").fill(str(tmp_path))
    page.locator("#pairs-from-folders").click()
    page.get_by_text("There is no folder").first.wait_for()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    evil = tmp_path / "evil.zip"
    with zipfile.ZipFile(evil, "w") as out:
        out.writestr("../../evil.png", buffer.getvalue())
    page.get_by_role("tab", name="Archive or list").click()
    page.locator("#pairs-file-drop input[type=file]").set_input_files(str(evil))
    page.locator("#pairs-file-drop").get_by_text("evil.zip").first.wait_for()
    page.locator("#pairs-from-file").click()
    page.get_by_text("leads out of it").first.wait_for()
    assert "Traceback" not in page.content()


def test_a_captioning_model_that_is_missing_is_named(app: Any, open_page: Callable[..., Any], pictures: Path) -> None:
    page = open_page(app.url)
    field(page, "pairs-chosen").fill(str(pictures / "chosen"))
    field(page, "pairs-rejected").fill(str(pictures / "rejected"))
    page.locator("#pairs-from-folders").click()
    has(page, "1 without a caption")
    page.get_by_text("Write captions with a model").click()
    page.locator("#pairs-caption").click()
    page.get_by_text("hf download florence-community/Florence-2-base", exact=False).first.wait_for()
