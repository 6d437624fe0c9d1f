"""ComfyUI-MaPO's core: preference training of LoRAs for text-to-image models.

The names below are the public API; they are loaded when they are used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .charts import run_chart
    from .cli import main
    from .comparisons import Comparison, run_comparisons
    from .config import TrainConfig, build_config, checked_name, load_config, load_settings, merge_settings, set_value
    from .continuation import continue_run, read_inspection
    from .demo.run import demo_pairs, demo_values
    from .errors import (
        CacheError,
        ConfigError,
        ExportError,
        MapoError,
        ModelError,
        PairsError,
        RunError,
        TrainingError,
    )
    from .families import FAMILIES, detect
    from .fields import FormField, FormGroup, form_field, form_groups
    from .goals import GOALS, Goal
    from .lora_card import model_card, save_model_card
    from .lora_copy import copy_lora, find_lora_copy
    from .memory_plan import plan_text
    from .methods import METHODS
    from .pictures import contact_sheet, pair_sheet
    from .reopen import open_trained
    from .report import run_report
    from .request import find_models, pairs_from, request_run, settings_text

__version__ = "0.1.0"

_HOMES = {
    "TrainConfig": "config",
    "build_config": "config",
    "checked_name": "config",
    "merge_settings": "config",
    "load_config": "config",
    "load_settings": "config",
    "set_value": "config",
    "MapoError": "errors",
    "CacheError": "errors",
    "ConfigError": "errors",
    "ExportError": "errors",
    "ModelError": "errors",
    "PairsError": "errors",
    "RunError": "errors",
    "TrainingError": "errors",
    "FAMILIES": "families",
    "detect": "families",
    "METHODS": "methods",
    "GOALS": "goals",
    "Goal": "goals",
    "find_models": "request",
    "plan_text": "memory_plan",
    "pairs_from": "request",
    "request_run": "request",
    "settings_text": "request",
    "Comparison": "comparisons",
    "run_comparisons": "comparisons",
    "copy_lora": "lora_copy",
    "find_lora_copy": "lora_copy",
    "model_card": "lora_card",
    "save_model_card": "lora_card",
    "FormField": "fields",
    "FormGroup": "fields",
    "form_field": "fields",
    "form_groups": "fields",
    "contact_sheet": "pictures",
    "pair_sheet": "pictures",
    "run_chart": "charts",
    "continue_run": "continuation",
    "read_inspection": "continuation",
    "run_report": "report",
    "demo_pairs": "demo.run",
    "demo_values": "demo.run",
    "open_trained": "reopen",
    "main": "cli",
}

__all__ = [
    "FAMILIES",
    "GOALS",
    "METHODS",
    "CacheError",
    "Comparison",
    "ConfigError",
    "ExportError",
    "FormField",
    "FormGroup",
    "Goal",
    "MapoError",
    "ModelError",
    "PairsError",
    "RunError",
    "TrainConfig",
    "TrainingError",
    "__version__",
    "build_config",
    "checked_name",
    "contact_sheet",
    "continue_run",
    "copy_lora",
    "demo_pairs",
    "demo_values",
    "detect",
    "find_lora_copy",
    "find_models",
    "form_field",
    "form_groups",
    "load_config",
    "load_settings",
    "main",
    "merge_settings",
    "model_card",
    "open_trained",
    "pair_sheet",
    "pairs_from",
    "plan_text",
    "read_inspection",
    "request_run",
    "run_chart",
    "run_comparisons",
    "run_report",
    "save_model_card",
    "set_value",
    "settings_text",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
