"""How the frozen denoiser lies in memory: its precision, what of it is on the device, what that costs in accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .adapter import adapter_off
from .frozen import StoredConv2d, StoredLinear, form_of, keep_as, storable_layers, store_weight, unit_of
from .offload import Block, BlockSwap

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from .batch import PairBatch
    from .families.base import DiffusionModel, Family
    from .frozen import Form, StoredWeight


def place_base(
    unet: nn.Module,
    device: torch.device,
    precision: Form = "full",
    offload_share: float = 0.0,
    fresh: Callable[[], nn.Module] | None = None,
) -> BlockSwap | None:
    """Bring the denoiser to its device, its frozen weights in a precision and a share of its blocks kept away.

    One layer at a time, so that nothing more than the result and one layer is ever on the device. Weights that have
    lost bits before are made from a fresh copy, so the result does not depend on what came before.

    Args:
        unet: on the CPU or on the device, with or without a LoRA.
        device: where it computes.
        precision: of the frozen weights.
        offload_share: of the blocks, by number, spread evenly.
        fresh: loads the denoiser again, on the CPU; needed where a weight is to be in another precision than now.

    Returns:
        The blocks that come and go, or None if none do.
    """
    layers = storable_layers(unet)
    before = {name: _stored(layer) for name, layer in layers.items()}
    if precision == "full" and not offload_share and not any(before.values()):
        unet.to(device)
        return None
    forms: dict[str, Form] = {name: form_of(layer, precision) for name, layer in layers.items()}
    source = layers
    if any(old is not None and old.form not in ("full", forms[name]) for name, old in before.items()):
        assert fresh is not None
        source = storable_layers(fresh())
    away = _spread([unit_of(unet, name) for name in _in_order(layers)], offload_share)
    swap = BlockSwap(device) if away else None
    blocks: dict[str, Block] = {}
    for name, layer in layers.items():
        unit = unit_of(unet, name)
        block = blocks.setdefault(unit, Block(swap)) if swap is not None and unit in away else None
        stored = before[name]
        if stored is None or stored.form != forms[name]:
            weight = _weight(source[name])
            stored = store_weight(weight if forms[name] == "full" and block else weight.to(device), forms[name])
        if block is None:
            stored = stored.moved(tuple(t.to(device) for t in stored.tensors))
        keep_as(layer, stored, block)
    unet.to(device)  # stored weights are no parameters: they are where they have to be, and stay there
    return swap


def base_bytes(unet: nn.Module) -> int:
    """Memory of the frozen weights, wherever they are."""
    stored = [s for layer in storable_layers(unet).values() if (s := _stored(layer)) is not None]
    return sum(s.nbytes for s in stored) + sum(p.nbytes for p in unet.parameters() if not p.requires_grad)


@torch.no_grad()
def base_prediction(model: DiffusionModel, family: Family, batch: PairBatch) -> Tensor:
    """What the denoiser says of a batch without its LoRA, float32."""
    was_training = model.unet.training
    model.unet.eval()
    with adapter_off(model.unet):
        found = family.predict(model, batch.noisy, batch.timesteps, batch.conditions).float()
    model.unet.train(was_training)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()


def _stored(layer: nn.Module) -> StoredWeight | None:
    if not isinstance(layer, StoredLinear | StoredConv2d):
        return None
    return layer.stored if layer.block is None else layer.block.host[layer.place]


def _weight(layer: nn.Module) -> Tensor:
    stored = _stored(layer)
    weight = layer.weight if stored is None else stored.unpack()
    assert isinstance(weight, torch.Tensor)
    return weight.detach()


def _in_order(layers: dict[str, nn.Module]) -> list[str]:
    """Down, middle, up; modules are registered in another order."""
    place = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return sorted(layers, key=lambda name: place[name.split(".")[0]])


def _spread(units: list[str], share: float) -> set[str]:
    """An even selection, so that copying one block has the computing of others to hide behind."""
    distinct = list(dict.fromkeys(units))
    return {u for i, u in enumerate(distinct) if int((i + 1) * share + 1e-9) > int(i * share + 1e-9)}
