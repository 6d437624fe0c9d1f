"""The types of the links between our nodes."""

from __future__ import annotations

from comfy_api.latest import io


class AnyStr(str):
    """A type name that passes both versions' link checks, which compare with `!=`: fits any input."""

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


Pairs = io.Custom("MAPO_PAIRS")
"""A `mapo_core.pairs.PairSet`."""

Settings = io.Custom("MAPO_SETTINGS")
"""A nested dict: part of what `TrainConfig` holds."""

Run = io.Custom("MAPO_RUN")
"""A `mapo_core.runs.RunDir`."""

LoraName = io.Custom(AnyStr("*"))
"""A LoRA's name as the stock loaders list it. A STRING cannot be linked to a list widget, this can."""
