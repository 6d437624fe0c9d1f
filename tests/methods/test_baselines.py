"""SFT and Diffusion-DPO by hand arithmetic, and what every method of the table must do."""

from __future__ import annotations

import math

import pytest
import torch

from mapo_core.methods import METHODS, DiffusionDPOConfig, DiffusionDPOLoss, SFTLoss

NECESSARY = {"dreambooth": {"class_prompt": "a photo of a dog"}}


def test_sft_is_the_chosen_error() -> None:
    loss, metrics = SFTLoss()(torch.tensor([0.1, 0.4]))
    assert loss.tolist() == pytest.approx([0.1, 0.4])
    assert metrics == {}


def test_dpo_by_hand() -> None:
    # u = -(beta/2) [(0.10 - 0.12) - (0.30 - 0.25)] = -(100/2) * (-0.07) = 3.5
    loss, metrics = DiffusionDPOLoss(beta=100.0)(*(torch.tensor([k]) for k in (0.10, 0.30, 0.12, 0.25)))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-3.5)), rel=1e-5)
    assert metrics["rewards/margins"].item() == pytest.approx(3.5, rel=1e-5)
    assert metrics["rewards/accuracies"].item() == 1.0


def test_dpo_starts_at_log_two_where_the_network_is_its_reference() -> None:
    k = torch.tensor([0.2])
    loss, _ = DiffusionDPOLoss(beta=5000.0)(k, 2 * k, k, 2 * k)
    assert loss.item() == pytest.approx(math.log(2))


def test_published_betas() -> None:
    assert DiffusionDPOConfig().build("sdxl").beta == 5000
    assert DiffusionDPOConfig().build("sd15").beta == 2000
    assert DiffusionDPOConfig(beta=10).build("sdxl").beta == 10


@pytest.mark.parametrize("name", METHODS)
def test_every_method_returns_a_finite_loss_per_pair_that_falls_with_the_chosen_error(name: str) -> None:
    method = METHODS[name](**NECESSARY.get(name, {})).build("sdxl")
    given = {"rejected_score": 0.0, "chosen_score": 1.0}
    fixed = ("_ref", "_base", "_score")
    errors = {n: torch.full((3,), given.get(n, 0.05), requires_grad=not n.endswith(fixed)) for n in method.needs}
    loss, metrics = method(**errors)
    assert loss.shape == (3,)
    assert torch.isfinite(loss).all()
    assert all(m.shape == (3,) and not m.requires_grad for m in metrics.values())
    loss.sum().backward()
    assert (errors["chosen_mse"].grad > 0).all()
    if "rejected_mse" in errors:
        assert (errors["rejected_mse"].grad < 0).all()
