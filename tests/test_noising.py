"""Randomness belongs to the pair."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from mapo_core.errors import ConfigError
from mapo_core.noising import add_noise, draw_randomness, seed_of, snr_weights
from mapo_core.sections import LossConfig


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


# --- noise levels, kinds of noise, label noise


def test_default_settings_change_nothing() -> None:
    for index in range(5):
        plain, set_ = draw(1, 2, index), draw(1, 2, index, settings=LossConfig())
        assert torch.equal(plain.noise, set_.noise)
        assert plain.timestep == set_.timestep
        assert not set_.swap


def test_no_setting_changes_what_the_others_draw() -> None:
    plain = draw(1, 2, 3)
    shaped = draw(1, 2, 3, settings=LossConfig(timestep_sampling="logit_normal", noise_offset=0.1))
    assert torch.equal(plain.latent_noise, shaped.latent_noise)
    assert shaped.timestep == draw(1, 2, 3, settings=LossConfig(timestep_sampling="logit_normal")).timestep
    assert torch.equal(shaped.noise, draw(1, 2, 3, settings=LossConfig(noise_offset=0.1)).noise)


def test_a_range_of_noise_levels_is_drawn_evenly_with_both_ends() -> None:
    settings = LossConfig(min_timestep=100, max_timestep=109)
    found = [draw(0, 0, i, settings=settings).timestep for i in range(2000)]
    assert set(found) == set(range(100, 110))
    assert all(140 < found.count(t) < 260 for t in range(100, 110))
    assert {draw(0, 0, i, settings=LossConfig(min_timestep=7, max_timestep=7)).timestep for i in range(9)} == {7}


def test_logit_normal_levels_have_the_quantiles_of_their_formula() -> None:
    settings = LossConfig(timestep_sampling="logit_normal", logit_mean=0.5, logit_std=0.8)
    found = torch.tensor([float(draw(0, 0, i, settings=settings).timestep) for i in range(4000)]) / 1000
    for share, normal in ((0.1, -1.2816), (0.5, 0.0), (0.9, 1.2816)):
        expected = 1 / (1 + math.exp(-(0.5 + 0.8 * normal)))
        assert abs(found.quantile(share).item() - expected) < 0.02


def test_a_range_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="must lie in 0 to 499"):
        draw_randomness(0, 0, 0, (4, 8, 8), num_train_timesteps=500, settings=LossConfig(max_timestep=600))


def test_offset_noise_is_one_number_per_channel() -> None:
    plain, offset = draw(0, 0, 1), draw(0, 0, 1, settings=LossConfig(noise_offset=0.3))
    added = offset.noise - plain.noise
    assert added.std(dim=(1, 2)).max() < 1e-6
    means = torch.cat(
        [
            (draw(0, 0, i, settings=LossConfig(noise_offset=0.3)).noise - draw(0, 0, i).noise)[:, 0, 0]
            for i in range(500)
        ]
    )
    assert abs(means.std().item() - 0.3) < 0.02
    assert abs(means.mean().item()) < 0.03


def test_multi_resolution_noise_has_more_of_the_low_frequencies_and_the_same_size() -> None:
    settings = LossConfig(multires_noise_levels=6, multires_noise_discount=0.6)

    def coarse(noise: torch.Tensor) -> float:
        return torch.nn.functional.avg_pool2d(noise, 4).var().item()

    plain = [draw_randomness(0, 0, i, (4, 16, 16), num_train_timesteps=1000).noise for i in range(100)]
    many = [
        draw_randomness(0, 0, i, (4, 16, 16), num_train_timesteps=1000, settings=settings).noise for i in range(100)
    ]
    assert all(abs(n.std().item() - 1) < 1e-5 for n in many)
    assert sum(map(coarse, many)) > 2 * sum(map(coarse, plain))


def test_snr_weights_by_hand() -> None:
    # alphas 0.9, 0.5, 0.1: snr 9, 1, 1/9
    alphas, t = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0, 1, 2])
    assert snr_weights(alphas, t, "min_snr", 5.0, False).tolist() == pytest.approx([5 / 9, 1, 1])
    assert snr_weights(alphas, t, "min_snr", 5.0, True).tolist() == pytest.approx([5 / 10, 1 / 2, (1 / 9) / (10 / 9)])
    assert snr_weights(alphas, t, "debiased", 5.0, False).tolist() == pytest.approx([1 / 3, 1, 3])
    assert snr_weights(alphas, t, "debiased", 5.0, True).tolist() == pytest.approx([3 / 10, 1 / 2, (1 / 3) / (10 / 9)])


def test_snr_weights_are_those_of_x_0_whatever_is_predicted() -> None:
    """The same error of x_0, seen as an error of epsilon and of v, has the same weighted square."""
    alphas, t = torch.tensor([0.97, 0.6, 0.2]), torch.tensor([0, 1, 2])
    for kind in ("min_snr", "debiased"):
        weighted = []
        for v_prediction in (False, True):
            a = (
                alphas if not v_prediction else torch.ones_like(alphas)
            )  # x_0 error to the square: eps a/(1-a), v 1/(1-a)
            weighted.append(snr_weights(alphas, t, kind, 2.0, v_prediction) * a / (1 - alphas))
        torch.testing.assert_close(weighted[0], weighted[1])


def test_zero_terminal_snr_divides_by_no_zero() -> None:
    for kind in ("epsilon", "v_prediction"):
        scheduler = DDPMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            rescale_betas_zero_snr=True,
            prediction_type=kind,
        )
        assert scheduler.alphas_cumprod[-1] == 0
        for weighting in ("min_snr", "debiased"):
            weights = snr_weights(scheduler.alphas_cumprod, torch.arange(1000), weighting, 5.0, kind == "v_prediction")
            assert torch.isfinite(weights).all()
            assert (weights >= 0).all()
            assert weights.max() < 40
    assert snr_weights(scheduler.alphas_cumprod, torch.tensor([999]), "min_snr", 5.0, True).item() == 0


def test_label_noise_swaps_the_same_share_of_the_pairs_in_every_epoch() -> None:
    settings = LossConfig(label_noise=0.3)
    first = [draw(5, 0, i, settings=settings).swap for i in range(1000)]
    assert first == [draw(5, 7, i, settings=settings).swap for i in range(1000)]
    assert first != [draw(6, 0, i, settings=settings).swap for i in range(1000)]
    assert 250 < sum(first) < 350
    more = [draw(5, 0, i, settings=LossConfig(label_noise=0.5)).swap for i in range(1000)]
    assert all(b for a, b in zip(first, more, strict=True) if a)  # a larger share adds to a smaller one
    assert all(draw(5, 0, i, settings=LossConfig(label_noise=1.0)).swap for i in range(50))
