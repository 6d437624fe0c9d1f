"""The pack as ComfyUI has it, with stand-ins for ComfyUI's own modules."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from scripts.comfy_stand_in import PACK, Comfy, ProgressBar, loaded_pack


@dataclass
class Pack:
    """The loaded pack, and the ComfyUI that it believes to be in."""

    comfy: Comfy

    def module(self, name: str) -> ModuleType:
        """A module of `nodes`."""
        return importlib.import_module(f"{PACK}.nodes.{name}")

    def node(self, node_id: str) -> Any:
        """A node by its id."""
        from scripts.comfy_stand_in import node_classes

        found = next(node for node in node_classes() if node.GET_SCHEMA().node_id == node_id)
        found.hidden = SimpleNamespace(unique_id="7")
        return found

    def run(self, node_id: str, **given: Any) -> Any:
        """Execute a node with the defaults of its widgets, as a prompt would."""
        node = self.node(node_id)
        widgets = {i.id: i.default for i in node.GET_SCHEMA().inputs if getattr(i, "default", None) is not None}
        return node.execute(**{**widgets, **given})


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "home"
    monkeypatch.setenv("MAPO_HOME", str(path))
    return path


@pytest.fixture
def pack(tmp_path: Path, home: Path) -> Iterator[Pack]:
    ProgressBar.told.clear()
    with loaded_pack(tmp_path / "comfy") as (_, comfy):
        yield Pack(comfy)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three pairs of pictures, matched by name; different enough for the check."""
    made = tmp_path / "good", tmp_path / "bad"
    for side, folder in enumerate(made):
        folder.mkdir()
        for n, name in enumerate(("cat", "dog", "owl")):
            picture = Image.effect_noise((96, 64), 60 + 20 * n).convert("RGB")
            picture.paste((40 + 80 * n, 200 * side, 90), (10 * n, 8, 40 + 10 * n, 40 + 8 * side))
            picture.save(folder / f"{name}.png")
            (folder / f"{name}.txt").write_text(f"a {name}", encoding="utf-8")
    return made
