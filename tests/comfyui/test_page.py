"""The pages of a real ComfyUI in a browser: the chart in the node, its buttons, the runs tab; old and new front end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.browser]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TAB = ".mapo-runs-tab-button"
STEPS = 12
WAIT_MS = 240_000

# On the page: the first number of "Step 3 of 12", and whether the chart shows anything.
STEP = "Number(/Step (\\d+) of/.exec(document.querySelector('.mapo-facts')?.textContent ?? '')?.[1] ?? -1)"
STATE = "(document.querySelector('.mapo-panel .mapo-state')?.textContent ?? '')"
DRAWN = """() => {
  const canvas = document.querySelector('.mapo-panel canvas');
  const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
  return data.some((value, i) => i % 4 === 3 && value > 0);
}"""
SERIALIZE = "() => (window.app.rootGraph ?? window.app.graph).serialize()"


def workflow(seed: int, name: str, steps: int = STEPS) -> dict[str, Any]:
    """Demo Model -> Train LoRA."""

    def node(id_: int, kind: str, x: int, values: list[Any]) -> dict[str, Any]:
        return {
            **{"id": id_, "type": kind, "pos": [x, 100], "size": [400, 640], "flags": {}, "order": id_, "mode": 0},
            **{"inputs": [], "outputs": [], "properties": {}, "widgets_values": values},
        }

    demo = node(1, "MaPODemoModel", 20, ["cartoon", steps, 0])
    train = node(2, "MaPOTrainLoRA", 460, ["demo (built in)", name, seed, "go on"])
    kinds = [("pairs", "MAPO_PAIRS"), ("settings", "MAPO_SETTINGS")]
    demo["outputs"] = [{"name": name, "type": kind, "links": [i]} for i, (name, kind) in enumerate(kinds, 1)]
    train["inputs"] = [{"name": name, "type": kind, "link": i} for i, (name, kind) in enumerate(kinds, 1)]
    links = [[i, 1, i - 1, 2, i - 1, kind] for i, (_, kind) in enumerate(kinds, 1)]
    return {"last_node_id": 2, "last_link_id": 2, "nodes": [demo, train], "links": links, "groups": [], "version": 0.4}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="install playwright to test the page")
    own = os.environ.get("CHROMIUM") or next((p for p in map(shutil.which, BROWSERS) if p), None)
    if own is None:
        pytest.skip("there is no Chromium on the PATH; set CHROMIUM to one")
    with playwright.sync_playwright() as play:
        started = play.chromium.launch(executable_path=own, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture(params=["old", "vue"])
def page(request: pytest.FixtureRequest, comfy: Any, browser: Any) -> Iterator[Any]:
    """A page of the old or the new front end; fails the test if one of our scripts complains."""
    comfy.post("/settings", {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": request.param == "vue"})
    opened = browser.new_page(viewport={"width": 1500, "height": 1000})
    complaints: list[str] = []
    ours = re.compile(r"MaPO:|extensions/ComfyUI-MaPO")
    opened.on("pageerror", lambda error: complaints.append(f"{error} {error.stack}"))
    opened.on("console", lambda said: said.type in ("warning", "error") and complaints.append(said.text))
    opened.mode = request.param
    load_page(opened, comfy.url)
    yield opened
    opened.close()
    assert [text for text in complaints if ours.search(text)] == []


def load_page(page: Any, url: str) -> None:
    page.goto(url, wait_until="domcontentloaded")
    page.wait_for_selector(TAB, timeout=WAIT_MS)
    page.wait_for_function("window.app.graph && window.app.canvas", timeout=WAIT_MS)


def show_workflow(page: Any, graph: dict[str, Any]) -> None:
    page.evaluate("async graph => { await window.app.loadGraphData(graph); }", graph)
    page.wait_for_selector(".mapo-panel")
    page.evaluate("() => { const d = window.app.canvas.ds; d.scale = 0.7; d.offset = [420, 80]; }")
    page.evaluate("() => window.app.canvas.setDirty(true, true)")


def wait_for(page: Any, expression: str) -> None:
    page.wait_for_function(f"() => {expression}", timeout=WAIT_MS)


def wait_for_queue(page: Any, comfy: Any) -> None:
    with contextlib.suppress(Exception):
        while comfy.get("/queue")["queue_running"]:
            page.wait_for_timeout(200)


def run_of(page: Any) -> str:
    return page.text_content(".mapo-panel .mapo-name")


def test_a_training_is_seen_in_its_node(page: Any, comfy: Any) -> None:
    """Run is clicked, the page is loaded again on the way, and the curves are there until the end and after it."""
    seed = {"old": 101, "vue": 102}[page.mode]  # the same inputs would reuse the other front end's run
    show_workflow(page, workflow(seed, name=f"seen {page.mode}"))
    page.locator('[data-testid="queue-button"]').click()
    wait_for(page, f"{STEP} >= 2")
    assert page.evaluate(DRAWN)
    name = run_of(page)

    load_page(page, comfy.url)
    wait_for(page, f"{STEP} >= 2")
    assert run_of(page) == name

    wait_for(page, f"{STATE} === 'Finished'")
    wait_for_queue(page, comfy)
    assert page.evaluate(f"() => {STEP}") == STEPS
    page.wait_for_function(
        "() => document.querySelector('.mapo-message').textContent.startsWith('In the LoRA list')", timeout=WAIT_MS
    )
    assert not page.locator(".mapo-panel .mapo-buttons").is_visible()
    saved = page.evaluate(SERIALIZE)
    train = next(n for n in saved["nodes"] if n["type"] == "MaPOTrainLoRA")
    assert train["properties"]["mapo_run"] == name
    assert train["widgets_values"] == ["demo (built in)", f"seen {page.mode}", seed, "go on"]

    load_page(page, comfy.url)  # the page kept the node's run by itself
    wait_for(page, f"{STEP} === {STEPS}")
    page.evaluate("async () => { await window.app.loadGraphData({ nodes: [], links: [], version: 0.4 }); }")
    show_workflow(page, saved)
    wait_for(page, f"{STEP} === {STEPS}")
    page.locator('[data-testid="queue-button"]').click()  # the same inputs again
    page.wait_for_timeout(1000)
    wait_for_queue(page, comfy)
    assert run_of(page) == name


def test_the_buttons_of_a_training(page: Any, comfy: Any) -> None:
    show_workflow(page, workflow({"old": 201, "vue": 202}[page.mode], name=f"asked {page.mode}", steps=2000))
    panel = page.locator(".mapo-panel")
    page.locator('[data-testid="queue-button"]').click()
    wait_for(page, f"{STEP} >= 1")
    name = run_of(page)

    panel.get_by_role("button", name="Pause").click()
    wait_for(page, f"{STATE} === 'Paused'")
    assert panel.get_by_role("button", name="Save now").is_disabled()
    panel.get_by_role("button", name="Resume").click()
    wait_for(page, f"{STATE} === 'Training'")
    panel.get_by_role("button", name="Save now").click()
    wait_for(page, "document.querySelector('.mapo-message').textContent.startsWith('Saved')")
    panel.get_by_role("button", name="Stop and save").click()
    wait_for(page, f"{STATE} === 'Stopped'")
    wait_for_queue(page, comfy)

    shown = comfy.get(f"/mapo/runs/{name}".replace(" ", "%20"))
    assert (shown["state"], shown["alive"]) == ("stopped", False)
    assert (comfy.runs / name / shown["lora"]).is_file()

    page.locator(TAB).click()
    card = page.locator(f'.mapo-card[aria-label="Run {name}"]')
    card.get_by_role("button", name="Resume").click()
    wait_for(page, f"/Training|Loading|Encoding/.test{STATE}")  # the node follows
    card.get_by_role("button", name="Stop and save").click()
    wait_for(page, f"{STATE} === 'Stopped'")


def test_the_runs_tab(page: Any, comfy: Any, make_finished: Callable[[str], None]) -> None:
    name = f"shown {page.mode}"
    make_finished(name)
    page.locator(TAB).click()
    card = page.locator(f'.mapo-card[aria-label="Run {name}"]')
    card.get_by_role("button", name="Details").click()
    card.locator(".mapo-facts").get_by_text("Step 2 of 2").wait_for()

    card.get_by_role("button", name="Copy to LoRAs").click()
    card.get_by_text(re.compile("In the LoRA list: mapo")).first.wait_for()
    assert [p.name for p in (comfy.base / "models" / "loras" / "mapo").glob(f"{name}*")] == [f"{name}.safetensors"]

    card.get_by_role("button", name="Delete").click()
    card.get_by_role("button", name="Keep").click()
    assert (comfy.runs / name).is_dir()
    card.get_by_role("button", name="Delete").click()
    card.get_by_role("button", name="Delete for good").click()
    card.wait_for(state="detached")
    assert not (comfy.runs / name).exists()


def test_a_node_in_a_subgraph_shows_its_run(page: Any, comfy: Any, make_finished: Callable[[str], None]) -> None:
    """The server calls such a node "5:2"; its panel gets the events."""
    name = f"inside {page.mode}"
    make_finished(name)
    show_workflow(page, workflow(seed=1, name="never run"))
    found = page.evaluate(
        """async name => {
          const graph = window.app.graph;
          const { node } = graph.convertToSubgraph(new Set(graph._nodes));
          const inner = node.subgraph._nodes.find(n => n.type === 'MaPOTrainLoRA');
          const detail = { node: `${node.id}:${inner.id}`, run: name, events: [] };
          window.app.api.dispatchEvent(new CustomEvent('mapo.progress', { detail }));
          await new Promise(done => setTimeout(done, 1500));
          const widget = inner.widgets.find(w => w.name === 'mapo_panel');
          return [inner.properties.mapo_run, widget.element.querySelector('.mapo-facts').textContent];
        }""",
        name,
    )
    assert found[0] == name
    assert found[1].startswith("Step 2 of 2")


@pytest.fixture
def make_finished(comfy: Any) -> Callable[[str], None]:
    """Puts a run on the disk as a trainer leaves it."""
    import json

    def make(name: str) -> None:
        folder = comfy.runs / name
        for part in ("requests", "checkpoints", "samples", "export"):
            (folder / part).mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model": {"path": "demo"}, "training": {"steps": 2}}))
        (folder / "export" / f"{name}.safetensors").write_bytes(name.encode())
        steps = [{"type": "step", "step": n, "steps": 2, "loss": 1 / n} for n in (1, 2)]
        ends = {"type": "run_finished", "step": 2, "lora": f"export/{name}.safetensors", "message": "Finished."}
        lines = [json.dumps({"v": 1, "time": 1.0, **event}) for event in (*steps, ends)]
        (folder / "events.jsonl").write_text("\n".join(lines) + "\n")

    return make
