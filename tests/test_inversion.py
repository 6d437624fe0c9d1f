"""Inversion: against diffusers' inverse scheduler, against the formula in float64, by hand, and sample by sample."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDPMScheduler
from torch import Tensor

from mapo_core.inversion import invert
from mapo_core.methods import Inversion
from mapo_core.noising import draw_randomness, inversion_levels

STEPS = 10
LEVELS = inversion_levels(STEPS, 1000)
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ALPHAS = DDPMScheduler(**BETAS).alphas_cumprod.double()


def network(x: Tensor, timestep: int, rows: Tensor) -> Tensor:
    """Any smooth function of latents, time and sample."""
    return torch.tanh(0.7 * x + 0.1 * rows.view(-1, 1, 1, 1)) + 0.3 * math.sin(timestep / 200)


def start(count: int = 4) -> Tensor:
    return torch.randn(count, 4, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_levels_are_evenly_spaced_and_end_at_the_last_timestep() -> None:
    assert LEVELS == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    assert inversion_levels(3, 1000) == [332, 665, 999]


@pytest.mark.parametrize("v_prediction", [False, True])
def test_ddim_inversion_equals_diffusers_scheduler(v_prediction: bool) -> None:
    scheduler = DDIMInverseScheduler(
        **BETAS,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction" if v_prediction else "epsilon",
    )
    scheduler.set_timesteps(STEPS)
    x = start(1)
    for level in LEVELS[:7]:
        x = scheduler.step(network(x, level, torch.tensor([0])), level, x).prev_sample
    found = invert(network, start(1), [6], None, ALPHAS, LEVELS, Inversion(STEPS), v_prediction=v_prediction)
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)  # the scheduler's alphas are float32


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.1])
def test_formula_sample_by_sample_in_float64(renoise: bool, eta: float) -> None:
    inversion = Inversion(STEPS, eta=eta, renoise=renoise)
    stops = [0, 9, 3, 5]
    noise = torch.randn(4, STEPS, 4, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = invert(network, start(), stops, noise if eta else None, ALPHAS, LEVELS, inversion)
    for i, stop in enumerate(stops):
        x, a = start()[i], 1.0
        row = torch.tensor([i])
        for k in range(stop + 1):
            b = ALPHAS[LEVELS[k]].item()
            eps = network(x[None], LEVELS[k], row)[0]
            clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            there = math.sqrt(b) * clean + math.sqrt(1 - b) * eps
            if renoise:
                eps = (eps + network(there[None], LEVELS[k], row)[0]) / 2
                clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
                there = math.sqrt(b) * clean + math.sqrt(1 - b) * eps
            x = there + eta * math.sqrt((1 - a) / (1 - b) * (1 - b / a)) * noise[i, k]
            a = b
        torch.testing.assert_close(found[i], x, rtol=1e-6, atol=1e-6)


def test_a_network_that_always_predicts_the_same_noise_gives_the_forward_process() -> None:
    eps = torch.full((1, 4, 3, 5), 0.5, dtype=torch.float64)
    found = invert(lambda x, t, rows: eps, start(1), [4], None, ALPHAS, LEVELS, Inversion(STEPS, renoise=True))
    a = ALPHAS[499]
    torch.testing.assert_close(found, a.sqrt() * start(1) + (1 - a).sqrt() * eps)


def test_one_step_by_hand() -> None:
    # From x_0 = 2 to alpha = 0.25 with eps = 1: 0.5 * 2 + sqrt(0.75) * 1
    found = invert(
        lambda x, t, rows: torch.ones_like(x),
        torch.full((1, 1, 1, 1), 2.0),
        [0],
        None,
        torch.tensor([0.25]),
        [0],
        Inversion(1),
    )
    assert found.item() == pytest.approx(1 + math.sqrt(0.75))


def test_a_sample_is_not_led_beyond_its_level() -> None:
    seen: list[tuple[int, list[int]]] = []

    def counting(x: Tensor, timestep: int, rows: Tensor) -> Tensor:
        seen.append((timestep, rows.tolist()))
        return torch.zeros_like(x)

    invert(counting, start(3), [0, 2, 1], None, ALPHAS, LEVELS, Inversion(STEPS))
    assert seen == [(99, [0, 1, 2]), (199, [1, 2]), (299, [1])]


def test_a_pairs_randomness_without_inversion_is_what_it_was_and_with_it_the_timestep_is_a_level() -> None:
    shape = (4, 2, 2)
    plain = draw_randomness(0, 3, 5, shape, num_train_timesteps=1000)
    inverted = draw_randomness(0, 3, 5, shape, num_train_timesteps=1000, inversion=Inversion(STEPS, eta=0.1))
    assert plain.inversion_noise is None
    assert torch.equal(plain.noise, inverted.noise)
    assert torch.equal(plain.latent_noise, inverted.latent_noise)
    assert inverted.timestep == plain.timestep // 100 * 100 + 99
    assert inverted.inversion_noise.shape == (STEPS, *shape)
    assert draw_randomness(0, 3, 5, shape, num_train_timesteps=1000, inversion=Inversion(5)).inversion_noise is None


def test_all_levels_are_drawn_about_equally_often() -> None:
    counts = dict.fromkeys(LEVELS, 0)
    for index in range(500):
        drawn = draw_randomness(0, 0, index, (1, 1, 1), num_train_timesteps=1000, inversion=Inversion(STEPS))
        counts[drawn.timestep] += 1
    assert min(counts.values()) > 25
