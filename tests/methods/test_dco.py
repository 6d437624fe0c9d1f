"""DCO by hand, and against its formula in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mapo_core.methods import DCOConfig, DCOLoss


def test_by_hand() -> None:
    # reward = -100 (0.10 - 0.13) = 3
    loss, metrics = DCOLoss(beta=100.0)(torch.tensor([0.10]), torch.tensor([0.13]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3)), rel=1e-5)
    assert metrics["rewards/chosen"].item() == pytest.approx(3, rel=1e-5)


def test_formula_and_gradient_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, base = torch.rand(2, 50, generator=generator, dtype=torch.float64) * 0.2
    beta = 50.0
    single = chosen.float().requires_grad_()
    loss, _ = DCOLoss(beta)(single, base.float())
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), torch.log(1 + torch.exp(beta * (chosen - base))), rtol=1e-4, atol=1e-6)
    weight = beta / (1 + torch.exp(-beta * (chosen - base)))  # beta sigmoid(beta (K_w - K_w_base))
    torch.testing.assert_close(single.grad.double(), weight, rtol=1e-4, atol=1e-5)


def test_a_small_beta_is_a_multiple_of_sft() -> None:
    chosen = torch.tensor([0.02, 0.3], requires_grad=True)
    loss, _ = DCOLoss(beta=1e-3)(chosen, torch.tensor([0.1, 0.1]))
    loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.full((2,), 0.5e-3), rtol=1e-3, atol=0)


def test_far_errors_stay_finite() -> None:
    chosen = torch.tensor([0.0, 50.0], requires_grad=True)
    loss, _ = DCOLoss()(chosen, torch.tensor([50.0, 0.0]))
    loss.sum().backward()
    assert loss.tolist() == [0.0, 50_000.0]
    assert chosen.grad.tolist() == [0.0, 1000.0]


def test_default_beta_is_the_authors() -> None:
    assert DCOConfig().build("sdxl").beta == DCOConfig().build("sd15").beta == 1000
