"""The tiny model and runs of the training tests."""

from __future__ import annotations

import pytest

from ..training.conftest import _fresh_accelerator, drawn_pairs, new_run, shared_home, tiny_model

__all__ = ["_fresh_accelerator", "drawn_pairs", "new_run", "shared_home", "tiny_model"]


@pytest.fixture(autouse=True)
def _empty_hub_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the developer has downloaded must not decide what is tested."""
    monkeypatch.setattr("mapo_core.evaluate.weights._from_hub_cache", lambda source: None)
