"""Model families. A new one is a file here and a line in FAMILIES; importing this loads neither torch nor diffusers."""

from __future__ import annotations

from ._blueprint import Blueprint
from ._quiet import quiet_import_notices
from ._tokens import count_tokens, count_windows, load_tokenizers
from .base import Detected, DiffusionModel, Family, ImageGeometry
from .detect import detect
from .sd15 import SD15
from .sdxl import SDXL

quiet_import_notices()

FAMILIES: dict[str, Family] = {"sdxl": SDXL(), "sd15": SD15()}

__all__ = [
    "FAMILIES",
    "Blueprint",
    "Detected",
    "DiffusionModel",
    "Family",
    "ImageGeometry",
    "count_tokens",
    "count_windows",
    "detect",
    "load_tokenizers",
]
