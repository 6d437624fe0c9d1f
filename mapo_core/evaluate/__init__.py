"""Measures of what a LoRA has learned."""

from __future__ import annotations

from .held_out import HeldOut, measure_held_out

__all__ = ["HeldOut", "measure_held_out"]
