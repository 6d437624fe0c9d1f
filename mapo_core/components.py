"""The modules of a model that can carry an adapter, and the names of their layers in files and settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from .families.base import DiffusionModel

UNET = "unet"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_TEXT_MODEL = "text_model."


def parts(model: DiffusionModel) -> dict[str, nn.Module]:
    """The denoiser, and the text encoders that are loaded, under diffusers' names."""
    return {UNET: model.unet, **dict(zip(TEXT_ENCODERS, model.text_encoders, strict=False))}


def full_name(part: str, path: str) -> str:
    """A layer's name: its path for the UNet, `text_encoder.text_model.encoder...` for a text encoder.

    transformers 5 has the first text encoder without the level `text_model`, which every file has.
    """
    if part == UNET:
        return path
    return f"{part}.{path if path.startswith(_TEXT_MODEL) else _TEXT_MODEL + path}"


def part_of(name: str) -> str:
    """The part that a full name belongs to."""
    first = name.partition(".")[0]
    return first if first in TEXT_ENCODERS else UNET


def path_in(part: str, module: nn.Module, name: str) -> str:
    """The path of a layer inside its module; the opposite of `full_name`."""
    if part == UNET:
        return name
    path = name.removeprefix(f"{part}.")
    return path if hasattr(module, "text_model") else path.removeprefix(_TEXT_MODEL)


def named_layers(model: DiffusionModel) -> Iterator[tuple[str, nn.Module]]:
    """Every module of every part under its full name."""
    for part, module in parts(model).items():
        for path, layer in module.named_modules():
            yield full_name(part, path), layer
