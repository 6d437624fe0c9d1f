"""The frozen base with fewer bits and away from the device: what must be exact is, and what is not is small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from mapo_core.base_weights import base_bytes, place_base
from mapo_core.frozen import StoredConv2d, StoredLinear, StoredWeight, storable_layers, store_weight
from mapo_core.fused_lora import fuse_lora

CPU = torch.device("cpu")


def unet_with_lora(folder: Path, targets: tuple[str, ...] = ("to_q", "to_v", "proj_in", "conv1")) -> nn.Module:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, target_modules=list(targets), lora_alpha=2))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return unet.train()


def forward(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return unet(
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([10, 900]),
        encoder_hidden_states=torch.randn(2, 7, 32, generator=generator),
        added_cond_kwargs={
            "text_embeds": torch.randn(2, 16, generator=generator),
            "time_ids": torch.full((2, 6), 32.0),
        },
    ).sample


def gradients(unet: nn.Module) -> dict[str, Tensor]:
    unet.zero_grad(set_to_none=True)
    forward(unet).pow(2).sum().backward()
    return {n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}


def fresh(folder: Path) -> nn.Module:
    return UNet2DConditionModel.from_pretrained(folder / "unet").requires_grad_(False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_offloaded_blocks_give_the_same_gradients_with_two_of_them_resident(
    tiny_model: Path, checkpointing: bool, share: float, fused: bool
) -> None:
    plain, moved = unet_with_lora(tiny_model), unet_with_lora(tiny_model)
    if fused:
        assert fuse_lora(plain) == fuse_lora(moved) > 0
    if checkpointing:
        plain.enable_gradient_checkpointing()
        moved.enable_gradient_checkpointing()
    swap = place_base(moved, CPU, "full", share)
    assert swap is not None
    for _ in range(2):  # the order is learned in the first pass and used in the second
        a, b = gradients(plain), gradients(moved)
        assert a.keys() == b.keys()
        # The fused layer sums base and update in one product, and in two where the base comes and goes.
        assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-5 * float(a[k].abs().max())) for k in a)
        assert fused or all(torch.equal(a[k], b[k]) for k in a)
    units = len(swap.order)
    assert units >= (8 if share == 1.0 else 4)
    assert swap.most_resident == 2
    assert sum(b.here is not None for b in swap.order) <= 2
    assert swap.copies < 2 * 4 * units  # each block comes at most twice per pass, and often once


def test_the_next_block_is_there_before_it_is_asked_for(tiny_model: Path) -> None:
    unet = unet_with_lora(tiny_model)
    swap = place_base(unet, CPU, "full", 1.0)
    with torch.no_grad():
        forward(unet)
        missed: list[int] = []
        real = swap.use

        def use(block):
            missed.extend([block.position] if block.here is None else [])
            return real(block)

        swap.use = use
        forward(unet)
    assert missed == [0]  # only the first of a pass


@pytest.mark.parametrize(
    ("form", "shape"),
    [
        ("full", (32, 24)),
        ("int8", (32, 24)),
        ("nf4", (32, 24)),
        ("fp8", (32, 24)),
        ("full", (16, 8, 3, 3)),
        ("fp8", (16, 8, 3, 3)),
    ],
)
def test_a_weight_comes_back_nearly_as_it_was(form: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    stored = store_weight(weight, form)
    back = stored.unpack()
    assert back.shape == weight.shape
    assert back.dtype == weight.dtype
    error = ((back - weight).norm() / weight.norm()).item()
    bits = {"full": 32, "fp8": 8, "int8": 8, "nf4": 4}[form]
    assert error <= {"full": 0, "int8": 0.011, "fp8": 0.03, "nf4": 0.1}[form]
    assert stored.nbytes * 8 <= weight.numel() * (bits + 2.5)


@pytest.mark.parametrize("form", ["int8", "nf4", "fp8"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_gradients_through_a_stored_base_are_those_of_the_weights_it_stands_for(
    tiny_model: Path, form: str, share: float
) -> None:
    stored, plain = unet_with_lora(tiny_model), unet_with_lora(tiny_model)
    place_base(stored, CPU, form, share)
    kept = storable_layers(stored)
    for name, layer in storable_layers(plain).items():
        layer.weight.data = kept[name].weight.clone()
    a, b = gradients(plain), gradients(stored)
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], rtol=1e-5, atol=1e-6 * float(a[k].abs().max())) for k in a)
    untouched = gradients(unet_with_lora(tiny_model))
    assert any(not torch.allclose(a[k], untouched[k], rtol=1e-4) for k in a)  # else nothing would be stored


def test_the_base_takes_less_memory_and_the_lora_stays_float32(tiny_model: Path) -> None:
    sizes = {}
    for form in ("full", "fp8", "int8", "nf4"):
        unet = unet_with_lora(tiny_model).to(torch.float32)
        before = base_bytes(unet)
        place_base(unet, CPU, form)
        sizes[form] = base_bytes(unet) / before
        assert all(p.dtype == torch.float32 for n, p in unet.named_parameters() if "lora_" in n)
        kinds = {type(m) for m in unet.modules()}
        assert (StoredLinear in kinds) == (form != "full")
        assert (StoredConv2d in kinds) == (form != "full")
    assert sizes["full"] == 1
    assert sizes["nf4"] < sizes["int8"] < 0.9
    assert sizes["fp8"] < 0.45


def test_a_rung_further_is_made_from_the_file_not_from_what_is_left(tiny_model: Path) -> None:
    at_once, in_steps = unet_with_lora(tiny_model), unet_with_lora(tiny_model)
    place_base(at_once, CPU, "nf4")
    place_base(in_steps, CPU, "int8")
    place_base(in_steps, CPU, "nf4", 0.0, lambda: fresh(tiny_model))
    with torch.no_grad():
        assert torch.equal(forward(at_once), forward(in_steps))
        place_base(in_steps, CPU, "nf4", 1.0)  # the same bits elsewhere need no file
        assert torch.equal(forward(at_once), forward(in_steps))


def test_a_lora_put_on_afterwards_is_the_same(tiny_model: Path) -> None:
    before, after = unet_with_lora(tiny_model), fresh(tiny_model)
    place_base(before, CPU, "nf4")
    place_base(after, CPU, "nf4")
    after.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_in", "conv1"], lora_alpha=2))
    after.load_state_dict({n: p for n, p in before.state_dict().items() if "lora_" in n}, strict=False)
    with torch.no_grad():
        assert torch.equal(forward(before), forward(after.train()))


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


@pytest.mark.parametrize("fused", [False, True])
def test_autograd_holds_no_stored_weight(tiny_model: Path, fused: bool) -> None:
    unet = unet_with_lora(tiny_model, ("to_q", "to_v", "to_out.0"))
    if fused:
        fuse_lora(unet)
    place_base(unet, CPU, "nf4")
    weights = [layer.weight for layer in storable_layers(unet).values() if isinstance(layer, StoredLinear)]
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(unet)
    assert held
    kept = [t for t in held for w in weights if t.ndim == 2 and (same(t, w) or same(t.t(), w))]
    assert kept == []


def test_a_stored_weight_moves_as_it_is() -> None:
    stored = store_weight(torch.randn(8, 8), "nf4")
    other = stored.moved(tuple(t.clone() for t in stored.tensors))
    assert isinstance(other, StoredWeight)
    assert torch.equal(stored.unpack(), other.unpack())
