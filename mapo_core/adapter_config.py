"""From the settings to peft's: which layers get an adapter, of which kind, rank and alpha."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft import LoHaConfig, LoKrConfig, LoraConfig
from torch import nn

from .components import UNET, full_name, parts
from .errors import ConfigError
from .lora_keys import some
from .sections import split_pattern

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .families.base import DiffusionModel, Family
    from .sections import AdapterConfig

_IN_BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")  # the layers that every loader of LoRAs has a name for
_CLIP_GROUPS = {"attention": ("q_proj", "k_proj", "v_proj", "out_proj"), "feed_forward": ("fc1", "fc2")}


@dataclass(frozen=True)
class Placement:
    """The layers of one part of the model that get an adapter.

    Attributes:
        part: "unet", "text_encoder" or "text_encoder_2".
        module: the part.
        ranks, alphas: per layer, under its path in the module, in the module's order.
    """

    part: str
    module: nn.Module
    ranks: dict[str, int]
    alphas: dict[str, float]


def place_adapters(
    model: DiffusionModel, family: Family, config: AdapterConfig, trained: Sequence[str]
) -> list[Placement]:
    """Decide on every layer.

    Args:
        model: without adapter.
        family: of the model.
        config: which layers, ranks and alphas.
        trained: the parts that get an adapter.

    Raises:
        ConfigError: a pattern is found in no layer's name.
    """
    chosen = {
        part: chosen_layers(part, module, family, config) for part, module in parts(model).items() if part in trained
    }
    names = [full_name(part, path) for part, paths in chosen.items() for path in paths]
    if chosen and not names:
        raise ConfigError(
            f"adapter.target_pattern {config.target_pattern!r} is found in no layer's name. Names are like "
            "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k, mid_block.resnets.0.conv1 and "
            "up_blocks.0.upsamplers.0.conv; it is looked for anywhere in them."
        )
    ranks = _by_pattern("rank_pattern", config.rank_pattern, names)
    alphas = _by_pattern("alpha_pattern", config.alpha_pattern, names)
    placements = []
    for part, paths in chosen.items():
        rank_of = {path: int(ranks.get(full_name(part, path), config.rank)) for path in paths}
        alpha_of = {
            path: alphas.get(full_name(part, path), float(rank_of[path]) if config.alpha is None else config.alpha)
            for path in paths
        }
        placements.append(Placement(part, parts(model)[part], rank_of, alpha_of))
    return placements


def chosen_layers(part: str, module: nn.Module, family: Family, config: AdapterConfig) -> list[str]:
    """Paths of the layers of a part that the settings name, in the module's order."""
    layers = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    if part == UNET:
        layers = [path for path in layers if path.startswith(_IN_BLOCKS)]
        ends = tuple(f".{name}" for name in family.target_modules(config.targets))
    else:
        layers = [path for path in layers if ".layers." in path]
        ends = tuple(f".{name}" for group in config.targets for name in _CLIP_GROUPS.get(group, ()))
        ends = ends or tuple(f".{name}" for name in _CLIP_GROUPS["attention"])
    if config.target_pattern is None:
        return [path for path in layers if path.endswith(ends)]
    found = [path for path in layers if re.search(config.target_pattern, full_name(part, path))]
    if part != UNET and not found:  # a pattern that is about the UNet says nothing of text encoders
        return [path for path in layers if path.endswith(ends)]
    return found


def peft_config(config: AdapterConfig, placement: Placement) -> Any:
    """peft's settings for one part."""
    ranks, alphas = placement.ranks, placement.alphas
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    common: dict[str, Any] = {
        "r": rank,
        "target_modules": list(ranks),
        "rank_pattern": peft_pattern(ranks, rank),
        "alpha_pattern": peft_pattern(alphas, alpha),
    }
    if config.type == "loha":
        return LoHaConfig(alpha=alpha, rank_dropout=config.dropout, **common)  # pyright: ignore[reportArgumentType]
    if config.type == "lokr":
        return LoKrConfig(
            alpha=alpha,  # pyright: ignore[reportArgumentType]
            rank_dropout=config.dropout,
            rank_dropout_scale=True,
            decompose_factor=config.lokr_factor,
            **common,
        )
    return LoraConfig(
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=config.dropout,
        init_lora_weights="gaussian",
        use_rslora=config.type == "rslora",
        use_dora=config.type == "dora",
        **common,
    )


def _by_pattern(setting: str, entries: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """The number of every layer in whose name a pattern is found; the first one counts."""
    found: dict[str, float] = {}
    for entry in entries:
        pattern, number = split_pattern(entry)
        own = [name for name in names if re.search(pattern, name)]
        if not own:
            raise ConfigError(
                f"adapter.{setting}: {pattern!r} is found in the name of no layer that gets a LoRA. There are "
                f"{some(names, 3)}. Correct it, or add the layers to adapter.targets."
            )
        found = {**dict.fromkeys(own, number), **found}
    return found


def peft_pattern(numbers: Mapping[str, float], default: float) -> dict[str, Any]:
    """One expression per number that is not the default, matching exactly the layers that have it."""
    by_number: dict[float, list[str]] = defaultdict(list)
    for path, number in numbers.items():
        if number != default:
            by_number[number].append(re.escape(path))
    return {f"^(?:{'|'.join(paths)})": number for number, paths in by_number.items()}
