"""Randomness belongs to the pair."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler

from mapo_core.noising import add_noise, draw_randomness, seed_of


def draw(seed: int = 0, epoch: int = 0, index: int = 0, **kwargs):
    return draw_randomness(seed, epoch, index, (4, 8, 8), num_train_timesteps=1000, **kwargs)


def test_the_same_three_numbers_give_the_same_randomness_whatever_was_drawn_before() -> None:
    first = draw(1, 2, 3)
    torch.randn(100)
    draw(9, 9, 9)
    again = draw(1, 2, 3)
    assert torch.equal(first.noise, again.noise)
    assert torch.equal(first.latent_noise, again.latent_noise)
    assert (first.timestep, first.flip, first.drop_prompt) == (again.timestep, again.flip, again.drop_prompt)
    for other in (draw(0, 2, 3), draw(1, 0, 3), draw(1, 2, 0)):
        assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.noise, first.latent_noise)


def test_options_do_not_change_the_noise() -> None:
    assert torch.equal(draw(0, 0, 5).noise, draw(0, 0, 5, flip=True, caption_dropout=0.5).noise)


def test_shares_are_as_asked() -> None:
    many = [draw(0, 0, i, flip=True, caption_dropout=0.2) for i in range(1000)]
    assert 430 < sum(r.flip for r in many) < 570
    assert 150 < sum(r.drop_prompt for r in many) < 250
    timesteps = torch.tensor([float(r.timestep) for r in many])
    assert 450 < timesteps.mean() < 550
    assert timesteps.min() >= 0
    assert timesteps.max() < 1000
    assert not any(draw(0, 0, i).flip or draw(0, 0, i).drop_prompt for i in range(50))


def test_seeds_do_not_depend_on_the_process() -> None:
    assert seed_of(0, "pair", 1, 2) == seed_of(0, "pair", 1, 2)
    assert seed_of(0) != seed_of("1")
    assert 0 <= seed_of("x") < 2**63


def test_targets_of_both_prediction_types() -> None:
    latents, noise = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)
    timesteps = torch.tensor([10, 900])
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
        noisy, target = add_noise(scheduler, latents, noise, timesteps)
        a = scheduler.alphas_cumprod[timesteps].sqrt()[:, None, None, None]
        b = (1 - scheduler.alphas_cumprod[timesteps]).sqrt()[:, None, None, None]
        torch.testing.assert_close(noisy, a * latents + b * noise)
        torch.testing.assert_close(target, noise if kind == "epsilon" else a * noise - b * latents)
