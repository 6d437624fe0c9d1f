"""A dependency that is missing disables the nodes that need it, and they say what to do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from scripts.comfy_stand_in import PACK, object_info


def test_every_node_of_the_module_gets_a_stand_in(pack: Any) -> None:
    missing = pack.module("_missing")
    error = ImportError("No module named 'pandas'", name="pandas")
    for name in ("pairs", "pair_sets", "train", "lora", "results", "demo"):
        real = {node.GET_SCHEMA().node_id for node in pack.module(name).NODES}
        assert set(missing.node_ids(Path(missing.__file__).with_name(f"{name}.py"))) == real
        for node in missing.stand_ins(name, error):
            info = object_info(node)
            assert "pandas" in info["description"]
            with pytest.raises(RuntimeError, match=r"pandas is missing.*-m pip install -r .*requirements\.txt"):
                node.execute(anything=1)


def test_one_module_that_cannot_be_imported_leaves_the_others(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = pack.module("train").__package__
    monkeypatch.delitem(sys.modules, f"{PACK}.nodes.results", raising=False)
    monkeypatch.setitem(sys.modules, f"{PACK}.nodes.results", None)
    found = {n.GET_SCHEMA().node_id: n for n in sys.modules[nodes].all_nodes()}
    assert "MaPOTrainLoRA" in found
    assert "not available" in found["MaPOCompare"].GET_SCHEMA().display_name
