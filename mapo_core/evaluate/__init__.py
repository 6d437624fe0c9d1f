"""Measures of base models, pair sets and LoRAs. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .embedding import EMBEDDERS, Embedder, embed_files, load_embedder
    from .evaluation import EvaluationSettings, evaluate_run
    from .held_out import HeldOut, HeldOutErrors, held_out_errors, measure_held_out
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
    from .report import HeldOutComparison, RunEvaluation, ScorerComparison, read_evaluation
    from .scorers import SCORERS, Scorer, ScorerOptions, choose_scorers, describe_scorer, load_scorer, missing_weights
    from .statistics import Interval, mean_interval

__all__ = [
    "BETAS",
    "EMBEDDERS",
    "SCORERS",
    "Embedder",
    "EvaluationSettings",
    "HeldOut",
    "HeldOutComparison",
    "HeldOutErrors",
    "Interval",
    "Mismatch",
    "MismatchPictures",
    "RunEvaluation",
    "Scorer",
    "ScorerComparison",
    "ScorerOptions",
    "betas_to_try",
    "choose_scorers",
    "describe_scorer",
    "embed_files",
    "evaluate_run",
    "held_out_errors",
    "load_embedder",
    "load_scorer",
    "mean_interval",
    "measure_held_out",
    "measure_mismatch",
    "mismatch_of",
    "mismatch_sheet",
    "missing_weights",
    "read_evaluation",
    "suggested_beta",
]

_MODULES = {
    "embedding": ("EMBEDDERS", "Embedder", "embed_files", "load_embedder"),
    "evaluation": ("EvaluationSettings", "evaluate_run"),
    "held_out": ("HeldOut", "HeldOutErrors", "held_out_errors", "measure_held_out"),
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
    "report": ("HeldOutComparison", "RunEvaluation", "ScorerComparison", "read_evaluation"),
    "scorers": (
        "SCORERS",
        "Scorer",
        "ScorerOptions",
        "choose_scorers",
        "describe_scorer",
        "load_scorer",
        "missing_weights",
    ),
    "statistics": ("Interval", "mean_interval"),
}
_WHERE = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value
