"""The example workflows fit the nodes, and saved workflows of users keep fitting them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mapo_core import build_config, merge_settings
from scripts import workflows
from scripts.comfy_stand_in import schemas

HERE = Path(__file__).resolve().parent
INFOS = {**workflows.STOCK, **schemas()}
FILES = sorted(workflows.FOLDER.glob("*.json"))
ORDER = HERE / "widget_order.json"


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_they_are_up_to_date() -> None:
    texts = workflows.workflow_texts()
    assert {path.stem for path in FILES} == set(texts)
    for name, text in texts.items():
        path = workflows.FOLDER / f"{name}.json"
        assert path.read_text(encoding="utf-8") == text, "run: python scripts/workflows.py"


def test_new_widgets_come_last() -> None:
    """What users have saved holds values by position; an order that is in a release can only be appended to."""
    pinned = load(ORDER)
    now = {
        name: [i for i, (type_, _) in workflows.specs(name, INFOS).items() if type_ in workflows.WIDGETS]
        for name in schemas()
    }
    assert set(pinned) == set(now), "add new nodes to tests/nodes/widget_order.json; old ones stay"
    for name, order in pinned.items():
        assert now[name] == order, f"{name}: append new widgets, and to tests/nodes/widget_order.json"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nodes_and_widgets_exist_and_hold_what_they_take(path: Path) -> None:
    for node in load(path)["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        specs = workflows.specs(node["type"], INFOS)
        assert [(i["name"], i["type"]) for i in node["inputs"]] == [(n, t) for n, (t, _) in specs.items()]
        names = []
        for name, (type_, _) in specs.items():
            if type_ in workflows.WIDGETS:
                names.append(name)
                names += ["control"] * ((node["type"], name) in workflows.CONTROLLED)
        assert len(names) == len(node["widgets_values"]), node["type"]
        for name, value in zip(names, node["widgets_values"], strict=True):
            assert name == "control" or fits(value, *specs[name]), f"{node['type']}.{name} = {value!r}"


def fits(value: Any, type_: str, options: dict[str, Any]) -> bool:
    if type_ == "COMBO":
        machines = value.endswith(".safetensors") or value == ""  # lists of files differ from machine to machine
        return machines or "options" not in options or value in options["options"]
    kinds = {"INT": int, "FLOAT": (int, float), "BOOLEAN": bool, "STRING": str}
    if not isinstance(value, kinds[type_]) or (type_ == "INT" and isinstance(value, bool)):
        return False
    return type_ not in ("INT", "FLOAT") or options.get("min", value) <= value <= options.get("max", value)


def test_values_that_do_not_fit_are_seen() -> None:
    number = {"min": 0, "max": 10}
    assert fits(3, "INT", number)
    assert not any(fits(v, "INT", number) for v in (True, 1.5, "3", 11, -1))
    assert not fits("x", "COMBO", {"options": ["a"]})


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_links_are_of_one_type_and_noted_at_both_ends(path: Path) -> None:
    flow = load(path)
    nodes = {node["id"]: node for node in flow["nodes"]}
    for number, source, slot, target, place, type_ in flow["links"]:
        output, given = nodes[source]["outputs"][slot], nodes[target]["inputs"][place]
        assert number in output["links"]
        assert given["link"] == number
        assert output["type"] == type_
        assert type_ in (given["type"], "*")
    noted = [i["link"] for node in flow["nodes"] for i in node["inputs"] if i["link"] is not None]
    assert sorted(noted) == [link[0] for link in flow["links"]]
    for node in flow["nodes"]:
        required = INFOS.get(node["type"], {"input": {"required": {}}})["input"]["required"]
        for given in node["inputs"]:
            if given["name"] in required and "widget" not in given:
                assert given["link"] is not None, f"{node['type']}: {given['name']} is not linked"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_nothing_overlaps(path: Path) -> None:
    flow = load(path)
    boxes = [(*n["pos"], n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1]) for n in flow["nodes"]]
    frames = [(x, y, x + w, y + h) for x, y, w, h in (group["bounding"] for group in flow["groups"])]
    for same in (boxes, frames):
        for n, one in enumerate(same):
            assert not [other for other in same[n + 1 :] if meets(one, other, 30 if same is boxes else 0)]
    for one in boxes:
        assert all(not meets(one, f, 0) or inside(one, f) for f in frames)


def meets(a: tuple[float, ...], b: tuple[float, ...], title: float) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] - title < b[3] and b[1] - title < a[3]


def inside(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return b[0] <= a[0] and b[1] <= a[1] - 30 and a[2] <= b[2] and a[3] <= b[3]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_it_has_a_note_and_a_picture(path: Path) -> None:
    flow = load(path)
    notes = [node for node in flow["nodes"] if node["type"] == "MarkdownNote"]
    assert notes
    assert notes[0]["widgets_values"][0].startswith("# ")
    assert "`" not in notes[0]["widgets_values"][0]  # the newer page shows code in a note unreadably
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.size == (400, 400)
    assert path.with_suffix(".jpg").stat().st_size < 60_000


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_its_settings_are_a_config(path: Path, pack: Any) -> None:
    """The settings that reach the trainer, worked out as ComfyUI would."""
    flow = load(path)
    made: dict[int, dict[str, Any]] = {}
    sources = {link[0]: link[1] for link in flow["links"]}
    found = 0
    for node in flow["nodes"]:
        given = {i["name"]: i["link"] for i in node["inputs"]}
        if node["type"].endswith("Settings"):
            widgets = [i["name"] for i in node["inputs"] if "widget" in i]
            before = made.get(sources.get(given["settings"], 0))
            values = dict(zip(widgets, node["widgets_values"], strict=True))
            assert pack.node(node["type"]).validate_inputs(**values) is True
            made[node["id"]] = pack.node(node["type"]).execute(settings=before, **values).args[0]
        if node["type"] == "MaPOTrainLoRA" and (settings := made.get(sources.get(given["settings"], 0))):
            config = build_config(
                merge_settings(settings, {"name": "x", "model": {"path": "m"}, "data": {"pairs": "p.jsonl"}})
            )
            assert config.training.steps >= 500
            found += 1
    assert found == (0 if path.stem == "1 Demo" else 1)
