"""The disk that a cache will take is known, masks and all, before anything is encoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from mapo_core import cache
from mapo_core.cache_files import list_cache, plan_prune
from mapo_core.config import load_config
from mapo_core.errors import CacheError
from mapo_core.pairs import open_pairs
from mapo_core.preflight import cache_bytes
from mapo_core.runs import RunDir
from tests.training.conftest import run_here

Run = Callable[..., RunDir]


def stored_bytes(path: Path) -> int:
    """What the tensors of a shard take."""
    with safe_open(path, framework="pt") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def test_images_and_masks_are_counted_before_and_kept_with_their_run(
    new_run: Run, drawn_pairs: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (48, 48), 200).save(tmp_path / "mask.png")
    square = [r for i, r in enumerate(drawn_pairs) if i % 3][:4]
    pairs = [{**r, "chosen_mask": str(tmp_path / "mask.png")} for r in square]
    run = new_run("masked", pairs, training={"steps": 1})
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))  # caches of its own, beside the run
    asked: dict[str, int] = {}

    def refuse(folder: Path, needed: int, what: str) -> None:
        asked[what] = needed
        if what == "images and masks":
            raise CacheError("no room")

    monkeypatch.setattr(cache, "check_space", refuse)
    with pytest.raises(CacheError, match="no room"):
        run_here(run)
    assert {s.kind for s in list_cache()} == {"prompts"}  # nothing of the rest was begun
    monkeypatch.undo()
    monkeypatch.setenv("MAPO_HOME", str(tmp_path))
    run_here(run)
    shards = list_cache()
    kept = {kind: sum(stored_bytes(s.path) for s in shards if s.kind == kind) for kind in ("latents", "masks")}
    assert kept["masks"] > 0
    assert asked["images and masks"] == kept["latents"] + kept["masks"]
    assert all(run.name in s.runs for s in shards)
    assert plan_prune(unused=True).shards == ()
    config = load_config(run.config)
    off = config.model_copy(update={"loss": config.loss.model_copy(update={"mask": "off"})})
    each = 64 * 4  # bytes of a mask of 32 x 32 pixels, of which a latent has 4 x 4
    found = open_pairs(run.pairs)
    assert cache_bytes(found, config, 64, 0) - cache_bytes(found, off, 64, 0) == 4 * each
    assert cache_bytes(found, config, 64, 0) == kept["latents"] + 4 * each  # masks of one file and crop are kept once
