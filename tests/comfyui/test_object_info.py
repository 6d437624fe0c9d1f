"""The stand-in for ComfyUI's node API tells the same as ComfyUI, so that what is written from it holds."""

from __future__ import annotations

import json
import urllib.parse
from typing import Any

import pytest

from scripts import node_docs, workflows
from scripts.comfy_stand_in import schemas

from .conftest import Comfy

pytestmark = pytest.mark.comfyui


@pytest.fixture(scope="module")
def comfy(start_comfy: Any) -> Comfy:
    return start_comfy()


def test_every_node_is_what_the_stand_in_says(comfy: Comfy) -> None:
    real = {name: info for name, info in comfy.get("/object_info").items() if name.startswith("MaPO")}
    ours = json.loads(json.dumps(schemas()))
    assert set(real) == set(ours)
    for name, info in ours.items():
        assert {key: real[name][key] for key in info} == info, name


def test_comfyuis_own_nodes_are_what_the_workflows_take_them_for(comfy: Comfy) -> None:
    real = comfy.get("/object_info")
    for name, ours in workflows.STOCK.items():
        count = len(ours["output"])  # newer versions may have more behind them
        assert real[name]["output"][:count] == ours["output"], name
        kinds = [
            ("COMBO" if isinstance(spec[0], list) else spec[0]) for spec in real[name]["input"]["required"].values()
        ]
        assert list(real[name]["input"]["required"]) == list(ours["input"]["required"]), name
        assert kinds == [spec[0] for spec in ours["input"]["required"].values()], name


def test_workflows_thumbnails_texts_and_help_are_served(comfy: Comfy) -> None:
    listed = next(iter(comfy.get("/api/workflow_templates").values()))
    assert sorted(listed) == sorted(workflows.WORKFLOWS)
    for name in listed:
        path = f"/api/workflow_templates/ComfyUI-MaPO/{urllib.parse.quote(name)}"
        assert comfy.get(f"{path}.json") == json.loads(workflows.workflow_texts()[name])
    assert (
        comfy.get("/i18n")["en"]["nodeDefs"]["MaPOTrainLoRA"]
        == json.loads(node_docs.LOCALE.read_text(encoding="utf-8"))["MaPOTrainLoRA"]
    )
