"""ComfyUI-MaPO's core: preference training of LoRAs for text-to-image models.

The names below are the public API; they are loaded when they are used, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cli import main
    from .config import TrainConfig, build_config, load_config, load_settings, set_value
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
    from .methods import METHODS
    from .reopen import open_trained

__version__ = "0.1.0"

_HOMES = {
    "TrainConfig": "config",
    "build_config": "config",
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
    "open_trained": "reopen",
    "main": "cli",
}

__all__ = [
    "FAMILIES",
    "METHODS",
    "CacheError",
    "ConfigError",
    "ExportError",
    "MapoError",
    "ModelError",
    "PairsError",
    "RunError",
    "TrainConfig",
    "TrainingError",
    "__version__",
    "build_config",
    "detect",
    "load_config",
    "load_settings",
    "main",
    "open_trained",
    "set_value",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
