"""Diffusion-SDPO's safeguard: arithmetic by hand, and what it promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mapo_core.methods import DiffusionDPOConfig, DiffusionDPOLoss, MaPOConfig, MaPOLoss, safeguard_factor


def factor(chosen: list[float], rejected: list[float], a_w: float, a_l: float, mu: float) -> float:
    return safeguard_factor(
        torch.tensor([chosen]), torch.tensor([rejected]), torch.tensor([a_w]), torch.tensor([a_l]), mu
    ).item()


@pytest.mark.parametrize(
    ("chosen", "rejected", "a_w", "a_l", "mu", "expected"),
    [
        ([1.0, 2.0], [2.0, 3.0], 1.0, -1.0, 0.6, 0.4 * 5 / 8),
        ([1.0, 2.0], [2.0, 3.0], 1.0, -4.0, 0.6, 0.4 * 5 / (4 * 8)),
        ([1.0, 2.0], [2.0, 3.0], 3.0, -4.0, 0.9, 0.1 * 3 * 5 / (4 * 8)),
        ([1.0, 2.0], [0.1, 0.1], 1.0, -1.0, 0.6, 1.0),  # 0.4 * 5 / 0.3 is over 1
        ([1.0, 2.0], [2.0, -3.0], 1.0, -9.0, 0.6, 1.0),  # the two do not get in each other's way
        ([1.0, 2.0], [2.0, -1.0], 1.0, -9.0, 0.6, 1.0),  # at right angles
        ([1.0, 2.0], [2.0, 3.0], 1.0, -1.0, 1.0, 0.0),
        ([1.0, 2.0], [2.0, 3.0], 1.0, 1.0, 0.6, 1.0),  # the rejected image is not pushed away
        ([0.0, 0.0], [2.0, 3.0], 1.0, -1.0, 0.6, 1.0),  # no division by zero
    ],
)
def test_against_arithmetic_by_hand(
    chosen: list[float], rejected: list[float], a_w: float, a_l: float, mu: float, expected: float
) -> None:
    assert factor(chosen, rejected, a_w, a_l, mu) == pytest.approx(expected, rel=1e-6)


def test_each_pair_has_its_own_factor() -> None:
    generator = torch.Generator().manual_seed(1)
    w, r = torch.randn(5, 4, 3, 3, generator=generator), torch.randn(5, 4, 3, 3, generator=generator)
    r = r + w
    pulls = torch.tensor([1.0, 2.0, 1.5, 1.0, 3.0]), -torch.tensor([1.0, 5.0, 2.0, 9.0, 4.0])
    together = safeguard_factor(w, r, *pulls, 0.6)
    apart = [safeguard_factor(w[i : i + 1], r[i : i + 1], *(p[i : i + 1] for p in pulls), 0.6) for i in range(5)]
    torch.testing.assert_close(together, torch.cat(apart))
    assert len(set(together.tolist())) == 5


@pytest.mark.parametrize("loss", [MaPOLoss("official", margin_weight=0.5), DiffusionDPOLoss(beta=500.0)])
@pytest.mark.parametrize("mu", [0.0, 0.6, 1.0])
def test_a_small_step_on_a_linear_model_does_not_raise_the_chosen_error(loss: Any, mu: float) -> None:
    """Predictions that are the weights themselves: the gradient of the weights is that of the output space."""
    rises = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(1, 6, generator=generator, dtype=torch.double)
        chosen = weights - 0.05 * torch.randn(1, 6, generator=generator, dtype=torch.double)
        apart = 0.06 * torch.randn(1, 6, generator=generator, dtype=torch.double)
        rejected = weights - 0.8 * (weights - chosen) - apart  # the two errors have much in common

        def errors(weights: torch.Tensor, *targets: torch.Tensor) -> list[torch.Tensor]:
            return [(weights - target).pow(2).mean(1) for target in targets]

        k = [e.requires_grad_() for e in errors(weights, chosen, rejected)]
        names = ["chosen_mse", "rejected_mse"]
        given = dict(zip(names, k, strict=True))
        given |= {n: given[n[:-4]].detach() for n in loss.needs if n.endswith("_ref")}
        pull_w, pull_l = torch.autograd.grad(loss(**given)[0].sum(), k)
        g_w, g_l = (2 / 6 * (weights - t) for t in (chosen, rejected))
        scale = safeguard_factor(g_w, g_l, pull_w, pull_l, mu)
        for guarded in (False, True):
            step = pull_w * g_w + pull_l * (scale if guarded else 1.0) * g_l
            rise = (g_w * step).sum().item()  # of K_w, to first order, for a step against the gradient: -rise
            if guarded:
                assert -rise <= -mu * (pull_w * g_w.pow(2).sum()).item() + 1e-12
            else:
                rises += rise < 0
    assert rises > 3  # else there was nothing to guard


def test_settings_choose_the_published_mu() -> None:
    for config, beta in ((MaPOConfig, {}), (DiffusionDPOConfig, {"beta": 10.0})):
        assert config(**beta).build("sdxl").safeguard_mu is None
        assert config(safeguard=True, **beta).build("sdxl").safeguard_mu == 0.6
        assert config(safeguard=True, **beta).build("sd15").safeguard_mu == 0.9
        assert config(safeguard=True, safeguard_mu=0.3, **beta).build("sd15").safeguard_mu == 0.3
    assert MaPOConfig(parametrisation="paper", safeguard=True).build("sdxl").safeguard_mu == 0.6
