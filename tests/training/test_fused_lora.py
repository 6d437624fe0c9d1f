"""The fused linear layer of a LoRA computes what peft computes, and leaves to peft what is not plain."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from mapo_core.adapter import adapter_off
from mapo_core.fused_lora import FusedLinear, fuse_lora

from .conftest import Run
from .test_equalities import first_gradients


def layered(**settings: object) -> nn.Sequential:
    """Two linear layers, the first with a bias, each with a LoRA of rank 4 whose up weights are not zero."""
    torch.manual_seed(0)
    values = {"r": 4, "lora_alpha": 6, "target_modules": ["0", "2"], "init_lora_weights": "gaussian", **settings}
    net = nn.Sequential(nn.Linear(24, 32), nn.SiLU(), nn.Linear(32, 16, bias=False)).requires_grad_(False)
    net = inject_adapter_in_model(LoraConfig(**values), net)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return net


def results(net: nn.Module, x: Tensor, autocast: bool = False) -> list[Tensor]:
    """The output, its gradient at x, and those of the LoRA."""
    x = x.clone().requires_grad_()
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        output = net(x)
    output.float().pow(2).sum().backward()
    return [output.detach(), x.grad, *(p.grad.clone() for p in net.parameters() if p.requires_grad)]


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    assert len(a) == len(b) == 6
    return max(
        ((x.double() - y.double()).abs().max() / y.double().abs().max()).item() for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("shape", [(3, 5, 24), (7, 24)])
def test_output_and_gradients_are_those_of_peft(shape: tuple[int, ...]) -> None:
    plain = layered()
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 2
    x = torch.randn(*shape)
    assert worst(results(fused, x), results(plain, x)) < 1e-6
    assert all(p.grad is None for n, p in fused.named_parameters() if "lora_" not in n)


def test_no_gradient_of_x_where_nobody_asks_for_it() -> None:
    net = layered()
    fuse_lora(net)
    x = torch.randn(3, 24)
    net(x).sum().backward()
    assert x.grad is None
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_under_autocast_and_with_a_half_precision_base_it_is_no_less_exact_than_peft() -> None:
    exact = layered()
    x = torch.randn(3, 50, 24)
    truth = results(exact, x)
    for autocast, dtype in ((True, torch.float32), (True, torch.bfloat16), (False, torch.bfloat16)):
        nets = [copy.deepcopy(exact), copy.deepcopy(exact)]
        fuse_lora(nets[0])
        for net in nets:
            for name, parameter in net.named_parameters():
                if "lora_" not in name:
                    parameter.data = parameter.data.to(dtype)
        found, expected = (results(net, x if autocast else x.to(dtype), autocast) for net in nets)
        assert found[0].dtype == expected[0].dtype == torch.bfloat16
        assert all(g.dtype == torch.float32 for g in found[2:])
        errors = [worst(found, truth), worst(expected, truth)]
        assert errors[0] < 1.3 * errors[1] + 0.01


def test_switched_off_it_is_the_base_layer() -> None:
    net = layered()
    base = nn.Sequential(*(m.base_layer if hasattr(m, "base_layer") else m for m in net))
    fuse_lora(net)
    x = torch.randn(3, 24)
    assert not torch.allclose(net(x), base(x))
    with adapter_off(net):
        assert torch.equal(net(x), base(x))


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_dropout": 0.5}, {"lora_bias": True, "init_lora_weights": True}]
)
def test_what_is_not_plain_is_left_to_peft(settings: dict[str, object]) -> None:
    plain = layered(**settings)
    fused = copy.deepcopy(plain)
    fuse_lora(fused)
    x = torch.randn(3, 24)
    torch.manual_seed(1)
    a = fused(x)
    torch.manual_seed(1)
    assert torch.equal(a, plain(x))


class Doubling(nn.Linear):
    """Stands for a base layer with a forward pass of its own, as packed weights have."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_base_layer_of_another_class_computes_by_itself(autocast: bool) -> None:
    plain = layered()
    for part in (plain[0], plain[2]):
        part.base_layer.__class__ = Doubling
    fused = copy.deepcopy(plain)
    assert fuse_lora(fused) == 2
    x = torch.randn(3, 5, 24)
    found = results(fused, x, autocast)
    assert worst(found, results(plain, x, autocast)) < (0.03 if autocast else 1e-6)
    with adapter_off(fused):
        assert not torch.allclose(fused(x), found[0].float(), atol=1e-3)


def test_a_hook_on_the_base_layer_is_called() -> None:
    """Offloading brings the weights to the device in such a hook."""
    net = layered()
    fuse_lora(net)
    called: list[bool] = []
    net[0].base_layer.register_forward_pre_hook(lambda *_: called.append(True))
    net(torch.randn(3, 24))
    assert called


def test_several_adapters_are_left_to_peft() -> None:
    net = layered()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"]), net, adapter_name="other")
    plain = copy.deepcopy(net)
    fuse_lora(net)
    for part in (*net, *plain):
        if hasattr(part, "set_adapter"):
            part.set_adapter(["default", "other"])
    x = torch.randn(3, 24)
    assert torch.equal(net(x), plain(x))


def test_the_trainer_uses_it(new_run: Run) -> None:
    from mapo_core.session import prepare

    session = prepare(new_run("fused-layers"), None, None)
    assert sum(isinstance(m, FusedLinear) for m in session.model.unet.modules()) > 10


def test_a_bf16_step_without_autocast_has_the_gradients_of_one_with_it(new_run: Run) -> None:
    from accelerate.state import AcceleratorState

    found: dict[str, Tensor] = {}
    for name, training in {
        "exact": {"precision": "fp32"},
        "autocast": {"precision": "bf16", "autocast": True},
        "plain": {"precision": "bf16"},
    }.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        gradients = first_gradients(new_run(f"fused-{name}", training=training, method={"type": "sft"}))
        assert all(g.dtype == torch.float32 for g in gradients)
        found[name] = torch.cat([g.flatten() for g in gradients])
    off = {n: (found[n] - found["exact"]).norm() / found["exact"].norm() for n in ("autocast", "plain")}
    assert off["plain"] < 0.05
    assert off["plain"] < 2 * off["autocast"] + 0.01
    assert off["plain"] > 0  # it is another precision


@pytest.mark.parametrize(
    ("precision", "autocast", "adapter", "expected"),
    [
        ("fp32", True, {}, False),
        ("bf16", None, {}, False),
        ("bf16", True, {}, True),
        ("bf16", None, {"targets": ["conv"]}, True),
        ("bf16", False, {"targets": ["conv"]}, False),
        ("bf16", None, {"dropout": 0.1}, True),
    ],
)
def test_when_autocast_is_on(
    new_run: Run, precision: str, autocast: bool | None, adapter: dict[str, object], expected: bool
) -> None:
    from mapo_core.session import prepare

    training = {"precision": precision, "autocast": autocast}
    session = prepare(new_run("fused-when", training=training, adapter=adapter), None, None)
    with session.step_autocast():
        assert torch.is_autocast_enabled("cpu") == expected
