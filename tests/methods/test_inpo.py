"""InPO's loss is Diffusion-DPO's; what differs is declared. How x_t is made: tests/test_inversion.py."""

from __future__ import annotations

import math

import pytest
import torch

from mapo_core.methods import DiffusionDPOLoss, InPOConfig, InPOLoss, Inversion


def test_by_hand() -> None:
    # u = -(100/2) [(0.10 - 0.12) - (0.30 - 0.25)] = 3.5
    loss, metrics = InPOLoss(beta=100.0)(*(torch.tensor([k]) for k in (0.10, 0.30, 0.12, 0.25)))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.5)), rel=1e-5)
    assert metrics["rewards/margins"].item() == pytest.approx(3.5, rel=1e-5)


def test_formula_and_gradients_in_float64() -> None:
    chosen, rejected, chosen_ref, rejected_ref = (
        torch.rand(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    )
    single = [chosen.float().requires_grad_(), rejected.float().requires_grad_()]
    loss, _ = InPOLoss(beta=200.0)(*single, chosen_ref.float(), rejected_ref.float())
    loss.sum().backward()
    u = -100 * ((chosen - chosen_ref) - (rejected - rejected_ref))
    torch.testing.assert_close(loss.double(), torch.log1p(torch.exp(-u)), rtol=1e-4, atol=1e-6)
    pull = 100 / (1 + torch.exp(u))
    torch.testing.assert_close(single[0].grad.double(), pull, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(single[1].grad.double(), -pull, rtol=1e-4, atol=1e-5)


def test_published_defaults() -> None:
    sdxl, sd15 = InPOConfig().build("sdxl"), InPOConfig().build("sd15")
    assert sdxl.inversion == sd15.inversion == Inversion(steps=10, eta=0.1)
    assert sdxl._dpo.beta == 5000
    assert sd15._dpo.beta == 2000
    assert InPOLoss.needs == DiffusionDPOLoss.needs
