"""SmPO's loss by hand, and against its formula in float64. How x_t is made: tests/test_inversion.py."""

from __future__ import annotations

import math

import pytest
import torch

from mapo_core.methods import Inversion, SmPOConfig, SmPOLoss


def test_by_hand() -> None:
    # u = 3.5 as for Diffusion-DPO; p = sigmoid(0.8 - 0.3) = 0.62246; logit = 10 * 0.24492 * 3.5 = 8.5722
    errors = [torch.tensor([k]) for k in (0.10, 0.30, 0.12, 0.25, 0.8, 0.3)]
    loss, metrics = SmPOLoss(beta=100.0, gamma=10.0)(*errors)
    p = math.exp(0.8) / (math.exp(0.8) + math.exp(0.3))
    assert p == pytest.approx(0.62246, abs=1e-5)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-10 * (2 * p - 1) * 3.5)), rel=1e-4)
    assert metrics["rewards/margins"].item() == pytest.approx(3.5, rel=1e-5)


def test_formula_and_gradients_in_float64() -> None:
    values = torch.rand(6, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen, rejected, chosen_ref, rejected_ref = values[:4] * 0.1
    high, low = values[4:]
    single = [chosen.float().requires_grad_(), rejected.float().requires_grad_()]
    others = [v.float() for v in (chosen_ref, rejected_ref, high, low)]
    loss, _ = SmPOLoss(beta=100.0, gamma=10.0)(*single, *others)
    loss.sum().backward()
    softmax = torch.stack([high, low]).softmax(dim=0)[0]
    factor = 10 * (2 * softmax - 1)
    u = -50 * ((chosen - chosen_ref) - (rejected - rejected_ref))
    torch.testing.assert_close(loss.double(), torch.log1p(torch.exp(-factor * u)), rtol=1e-4, atol=1e-6)
    pull = factor * 50 / (1 + torch.exp(factor * u))
    torch.testing.assert_close(single[0].grad.double(), pull, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(single[1].grad.double(), -pull, rtol=1e-3, atol=1e-5)


def test_equal_scores_teach_nothing() -> None:
    chosen, rejected = torch.tensor([0.1], requires_grad=True), torch.tensor([0.4], requires_grad=True)
    half = torch.tensor([0.5])
    loss, _ = SmPOLoss()(chosen, rejected, half, half, half, half)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen.grad.item() == rejected.grad.item() == 0


def test_published_defaults() -> None:
    sdxl, sd15 = SmPOConfig().build("sdxl"), SmPOConfig().build("sd15")
    assert (sdxl.beta, sdxl.gamma) == (5000, 10)
    assert sdxl.inversion == Inversion(steps=10, eta=0.0, renoise=True)
    assert sd15.inversion == Inversion(steps=5, eta=0.0, renoise=True)
