"""Label smoothing and weights by noise level, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mapo_core.errors import ConfigError
from mapo_core.methods import (
    METHODS,
    WITH_INVERSION,
    WITH_SFT_TERM,
    DiffusionDPOConfig,
    DiffusionDPOLoss,
    DreamBoothLoss,
    InPOConfig,
    MaPOConfig,
    MaPOLoss,
    SFTLoss,
    SmPOConfig,
)
from mapo_core.methods.smoothing import smooth_logsigmoid


def log_sigmoid(u: float) -> float:
    return -math.log1p(math.exp(-u))


@pytest.mark.parametrize("u", [-3.0, 0.0, 0.7, 4.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_by_hand(u: float, smoothing: float) -> None:
    expected = (1 - smoothing) * log_sigmoid(u) + smoothing * log_sigmoid(-u)
    assert smooth_logsigmoid(torch.tensor([u]), smoothing).item() == pytest.approx(expected, rel=1e-6)


def test_the_optimum_is_where_the_doubt_says() -> None:
    best = torch.tensor([math.log(0.8 / 0.2)], requires_grad=True)
    (gradient,) = torch.autograd.grad(smooth_logsigmoid(best, 0.2).sum(), best)
    assert gradient.item() == pytest.approx(0, abs=1e-7)


def test_dpo_with_smoothing_by_hand() -> None:
    # u = 3.5, see test_baselines
    errors = [torch.tensor([k]) for k in (0.10, 0.30, 0.12, 0.25)]
    loss, metrics = DiffusionDPOLoss(beta=100.0, label_smoothing=0.1)(*errors)
    assert loss.item() == pytest.approx(-0.9 * log_sigmoid(3.5) - 0.1 * log_sigmoid(-3.5), rel=1e-5)
    assert metrics["rewards/margins"].item() == pytest.approx(3.5, rel=1e-5)


def test_mapos_margin_term_alone_is_smoothed() -> None:
    k_w, k_l = torch.tensor([0.1]), torch.tensor([0.3])
    _, metrics = MaPOLoss("official", margin_weight=0.5, logit_scale=10.0)(k_w, k_l)
    u = metrics["rewards/margins"].item()
    loss, _ = MaPOLoss("official", margin_weight=0.5, logit_scale=10.0, label_smoothing=0.2)(k_w, k_l)
    assert loss.item() == pytest.approx(0.1 - 0.5 * (0.8 * log_sigmoid(u) + 0.2 * log_sigmoid(-u)), rel=1e-5)


def test_settings_reach_the_losses() -> None:
    assert MaPOConfig(label_smoothing=0.1).build("sdxl").smoothing == 0.1
    assert MaPOConfig(label_smoothing=0.1, parametrisation="paper").build("sdxl").smoothing == 0.1
    assert DiffusionDPOConfig(label_smoothing=0.1).build("sdxl").smoothing == 0.1
    assert SmPOConfig(label_smoothing=0.1).build("sdxl").smoothing == 0.1
    k = [torch.tensor([v]) for v in (0.10, 0.30, 0.12, 0.25)]
    plain, smoothed = (InPOConfig(beta=100, label_smoothing=e).build("sdxl")(*k)[0] for e in (0.0, 0.1))
    assert smoothed.item() > plain.item() + 0.1


def test_smpo_with_smoothing_by_hand() -> None:
    loss = SmPOConfig(beta=100.0, gamma=2.0, label_smoothing=0.25).build("sdxl")
    k = [torch.tensor([v]) for v in (0.10, 0.30, 0.12, 0.25, 1.0, 0.0)]
    u = 2.0 * (2 / (1 + math.exp(-1.0)) - 1) * 3.5
    assert loss(*k)[0].item() == pytest.approx(-0.75 * log_sigmoid(u) - 0.25 * log_sigmoid(-u), rel=1e-5)


def test_weights_by_noise_level_act_on_the_denoising_error_alone() -> None:
    k_w, k_l, weight = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.1]), torch.tensor([0.5, 3.0])
    assert SFTLoss()(k_w, sft_weight=weight)[0].tolist() == pytest.approx([0.05, 0.6])
    mapo = MaPOLoss("official", margin_weight=0.5)
    difference = mapo(k_w, k_l)[0] - mapo(k_w, k_l, sft_weight=weight)[0]
    assert difference.tolist() == pytest.approx([0.1 - 0.05, 0.2 - 0.6], rel=1e-5)
    both, _ = DreamBoothLoss(prior_weight=2.0)(k_w, k_l, sft_weight=weight, class_weight=torch.tensor([2.0, 1.0]))
    assert both.tolist() == pytest.approx([0.05 + 2 * 2 * 0.3, 0.6 + 2 * 0.1])


def test_methods_without_such_a_term_refuse_the_weights() -> None:
    from mapo_core import build_config

    base: dict[str, Any] = {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p.jsonl"}}
    for name in METHODS:
        method = {"type": name} | ({"class_prompt": "a dog"} if name == "dreambooth" else {})
        values = {**base, "method": method, "loss": {"snr_weighting": "min_snr"}}
        if name in WITH_SFT_TERM:
            assert build_config(values).loss.snr_weighting == "min_snr"
        else:
            with pytest.raises(ConfigError, match=rf"{name} has none beside its preference"):
                build_config(values)
        noise = {**base, "method": method, "loss": {"noise_offset": 0.05}}
        inverts = METHODS[name](**method).build("sdxl").inversion is not None
        assert inverts == (name in WITH_INVERSION)
        if inverts:
            with pytest.raises(ConfigError, match="finds its noise by inversion"):
                build_config(noise)
        else:
            assert build_config(noise).loss.noise_offset == 0.05
    with pytest.raises(ConfigError, match=r"loss.max_timestep \(3\) must not be below loss.min_timestep \(4\)"):
        build_config({**base, "loss": {"min_timestep": 4, "max_timestep": 3}})
