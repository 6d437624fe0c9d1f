"""The command line on a tiny model."""

from __future__ import annotations

from ..training.conftest import drawn_pairs, tiny_model

__all__ = ["drawn_pairs", "tiny_model"]
