"""Measures of base models, pair sets and LoRAs. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embedding import EMBEDDERS, Embedder, embed_files, load_embedder
    from .held_out import HeldOut, measure_held_out
    from .mismatch import (
        BETAS,
        Mismatch,
        MismatchPictures,
        betas_to_try,
        measure_mismatch,
        mismatch_of,
        mismatch_sheet,
        suggested_beta,
    )
    from .process import run_measure
    from .statistics import Interval, mean_interval

__all__ = [
    "BETAS",
    "EMBEDDERS",
    "Embedder",
    "HeldOut",
    "Interval",
    "Mismatch",
    "MismatchPictures",
    "betas_to_try",
    "embed_files",
    "load_embedder",
    "mean_interval",
    "measure_held_out",
    "measure_mismatch",
    "mismatch_of",
    "mismatch_sheet",
    "run_measure",
    "suggested_beta",
]

_MODULES = {
    "embedding": ("EMBEDDERS", "Embedder", "embed_files", "load_embedder"),
    "held_out": ("HeldOut", "measure_held_out"),
    "mismatch": (
        "BETAS",
        "Mismatch",
        "MismatchPictures",
        "betas_to_try",
        "measure_mismatch",
        "mismatch_of",
        "mismatch_sheet",
        "suggested_beta",
    ),
    "process": ("run_measure",),
    "statistics": ("Interval", "mean_interval"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value
