"""MaPO against 84 cases computed with 60 digits, and by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from mapo_core.config import build_config
from mapo_core.errors import ConfigError
from mapo_core.methods import MaPOConfig, MaPOLoss
from mapo_core.methods.mapo import log_phi

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "mapo_loss.json").read_text())


def loss_of(case: dict) -> MaPOLoss:
    if case["parametrisation"] == "paper":
        return MaPOLoss("paper", beta=case["beta"])
    return MaPOLoss(
        "official",
        margin_weight=case["margin_weight"],
        link_scale=case["link_scale"],
        logit_scale=case["logit_scale"],
    )


def assert_close(found: float, true: float, what: str) -> None:
    assert math.isfinite(found), what
    if abs(true) > 1e-6:
        assert abs(found - true) <= 1e-3 * abs(true), f"{what}: {found} instead of {true}"
    else:
        assert abs(found - true) <= 1e-6, f"{what}: {found} instead of {true}"


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_golden_case_in_float32(number: int) -> None:
    case = GOLDEN[number]
    chosen = torch.tensor([case["chosen_mse"]], dtype=torch.float32, requires_grad=True)
    rejected = torch.tensor([case["rejected_mse"]], dtype=torch.float32, requires_grad=True)
    method = loss_of(case)
    loss, metrics = method(chosen, rejected)
    loss.sum().backward()
    assert_close(loss.item(), case["loss"], "loss")
    assert_close(chosen.grad.item(), case["d_chosen"], "d_chosen")
    assert_close(rejected.grad.item(), case["d_rejected"], "d_rejected")
    assert_close(metrics["rewards/chosen"].item(), case["chosen_score"], "chosen_score")
    assert_close(metrics["rewards/rejected"].item(), case["rejected_score"], "rejected_score")


def test_all_golden_cases_are_there() -> None:
    assert len(GOLDEN) == 84
    assert {c["parametrisation"] for c in GOLDEN} == {"paper", "official"}


def test_log_phi_and_its_gradient_are_continuous_where_the_forms_meet() -> None:
    x = torch.tensor([0.0, 9.99e-3, 1.0e-2, 1.001e-2, 88.7, 200.0], requires_grad=True)
    values = log_phi(x)
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(x.grad).all()
    exact = x.detach().double()[1:].log() - torch.expm1(x.detach().double()[1:]).log()
    torch.testing.assert_close(values[1:].double(), exact, rtol=2e-6, atol=5e-7)
    assert x.grad[0].item() == -0.5
    assert abs(x.grad[1] - x.grad[2]) < 1e-4


def test_gradients_follow_the_closed_form_of_both_parametrisations() -> None:
    for method in (MaPOLoss("paper", beta=8.0), MaPOLoss("official", margin_weight=0.02)):
        chosen = torch.tensor([0.07, 0.004], dtype=torch.float64, requires_grad=True)
        rejected = torch.tensor([0.05, 0.006], dtype=torch.float64, requires_grad=True)
        loss, _ = method(chosen, rejected)
        loss.sum().backward()
        s, b, g, w = method.scale, method.power, method.gain, method.weight

        def phi(k: torch.Tensor) -> torch.Tensor:
            return k / torch.expm1(k)

        def slope(k: torch.Tensor) -> torch.Tensor:
            return (k.exp() - 1 - k * k.exp()) / torch.expm1(k) ** 2

        c, r = chosen.detach(), rejected.detach()
        q = torch.sigmoid(-g * (phi(s * c) ** b - phi(s * r) ** b))
        torch.testing.assert_close(chosen.grad, 1 - w * q * g * b * s * phi(s * c) ** (b - 1) * slope(s * c))
        torch.testing.assert_close(rejected.grad, w * q * g * b * s * phi(s * r) ** (b - 1) * slope(s * r))


def test_equal_errors_leave_only_the_chosen_term() -> None:
    shared = torch.tensor([0.03, 0.2], requires_grad=True)
    loss, metrics = MaPOLoss("official")(shared, shared)
    loss.sum().backward()
    torch.testing.assert_close(shared.grad, torch.ones(2))
    assert metrics["rewards/margins"].tolist() == [0.0, 0.0]


def test_a_field_of_the_other_form_is_an_error_that_names_the_right_one() -> None:
    base = {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p.jsonl"}}
    with pytest.raises(ConfigError, match=r"margin_weight belongs to parametrisation 'official'.*takes beta"):
        build_config({**base, "method": {"type": "mapo", "parametrisation": "paper", "margin_weight": 0.1}})
    with pytest.raises(ConfigError, match=r"beta belongs to parametrisation 'paper'.*margin_weight"):
        build_config({**base, "method": {"type": "mapo", "parametrisation": "official", "beta": 8}})


def test_defaults_are_the_published_ones_and_the_demo_has_its_own() -> None:
    official = MaPOConfig(parametrisation="official").build("sdxl")
    assert (official.weight, official.scale, official.gain, official.power) == (0.1, 0.5, 1000.0, 1.0)
    assert MaPOConfig(parametrisation="official").build("demo").weight == 0.02
    paper = MaPOConfig(beta=32.0).build("sdxl")
    assert (paper.weight, paper.scale, paper.gain, paper.power) == (1 / 32, 1.0, 1.0, 32.0)


def test_settings_of_one_form_alone_mean_that_form() -> None:
    assert MaPOConfig().parametrisation == "paper"
    assert MaPOConfig(beta=8).parametrisation == "paper"
    assert MaPOConfig(margin_weight=0.05).parametrisation == "official"
    assert MaPOConfig(logit_scale=100.0, margin_weight=None).parametrisation == "official"
    assert MaPOConfig(safeguard=True).parametrisation == "paper"
    with pytest.raises(ValueError, match="margin_weight belongs to parametrisation 'official'"):
        MaPOConfig(beta=8, margin_weight=0.05)
