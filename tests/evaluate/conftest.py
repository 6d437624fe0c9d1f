"""The tiny model and runs of the training tests."""

from __future__ import annotations

from ..training.conftest import _fresh_accelerator, drawn_pairs, new_run, shared_home, tiny_model

__all__ = ["_fresh_accelerator", "drawn_pairs", "new_run", "shared_home", "tiny_model"]
