"""Masks, noise levels, weights and label noise in the trainer, and that nothing depends on how a step is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mapo_core.backward as backward
from mapo_core.backward import backward_batch
from mapo_core.batch import PairBatch, assemble, mean_squares, mean_squares_gradient, residuals
from mapo_core.data_order import Draw
from mapo_core.errors import PairsError
from mapo_core.noising import draw_randomness, snr_weights
from mapo_core.runs import read_events
from mapo_core.session import Session, prepare

from .conftest import Run, lora_of, run_here
from .test_equalities import METHODS, first_gradients, stop_after
from .test_split_pairs import prepared, step_of

EVERYTHING = {
    "snr_weighting": "min_snr",
    "timestep_sampling": "logit_normal",
    "logit_mean": 0.3,
    "min_timestep": 50,
    "max_timestep": 900,
    "noise_offset": 0.05,
    "multires_noise_levels": 3,
    "label_noise": 0.3,
    "mask_floor": 0.1,
}


@pytest.fixture
def masked_pairs(drawn_pairs: list[dict[str, Any]], tmp_path: Path) -> list[dict[str, Any]]:
    """The drawn pairs; every second has masks: the left half of the chosen image, the upper half of the rejected."""
    records = []
    for i, record in enumerate(drawn_pairs):
        record = dict(record)
        if i % 2:
            for side in ("chosen", "rejected"):
                with Image.open(record[side]) as image:
                    width, height = image.size
                values = np.zeros((height, width), dtype=np.uint8)
                if side == "chosen":
                    values[:, : width // 2] = 255
                else:
                    values[: height // 2] = 255
                path = tmp_path / f"{side}-{i}.png"
                Image.fromarray(values).save(path)
                record[f"{side}_mask"] = str(path)
        records.append(record)
    return records


def batch_of(session: Session, indices: list[int]) -> PairBatch:
    config = session.config
    draws = [
        draw_randomness(0, 0, i, session.pairs.latent_shape(i), num_train_timesteps=1000, flip=config.data.flip)
        for i in indices
    ]
    return assemble(session.pairs, indices, draws, session.model, session.family, paired=True)


# --- masks


def test_masks_are_those_of_the_files_flipped_with_their_images(
    new_run: Run, masked_pairs: list[dict[str, Any]]
) -> None:
    session = prepare(new_run("masks", pairs=masked_pairs, data={"flip": True}), None, None)
    square = [i for i in range(12) if i % 3]
    draws = [draw_randomness(0, 0, i, (4, 8, 8), num_train_timesteps=1000, flip=True) for i in square]
    batch = batch_of(session, square)
    assert batch.mask is not None
    assert batch.mask.shape == (16, 1, 8, 8)
    left, top = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    left[:, :, :4], top[:, :4] = 1, 1
    assert {d.flip for d in draws} == {True, False}
    for n, (i, draw) in enumerate(zip(square, draws, strict=True)):
        chosen, rejected = batch.mask[n], batch.mask[8 + n]
        if i % 2 == 0:
            assert chosen.min() == rejected.min() == 1
            continue
        expected = left.flip(-1) if draw.flip else left
        torch.testing.assert_close(chosen, expected, rtol=0, atol=0.05)  # the image is enlarged before
        torch.testing.assert_close(rejected, top, rtol=0, atol=0.05)


def test_the_masked_error_by_hand(new_run: Run, masked_pairs: list[dict[str, Any]]) -> None:
    session = prepared(new_run("masked", pairs=masked_pairs))
    batch = batch_of(session, [1, 2])
    with torch.no_grad():
        residual = residuals(session.model, session.family, batch)
    found = mean_squares(batch, residual)
    assert batch.mask is not None
    for row in range(4):
        total = weight = 0.0
        for y in range(8):
            for x in range(8):
                m = batch.mask[row, 0, y, x].item()
                total += m * residual[row, :, y, x].pow(2).sum().item()
                weight += m * 4
        assert found[row].item() == pytest.approx(total / weight, rel=1e-5)
    assert found[1].item() == pytest.approx(residual[1].pow(2).mean().item(), rel=1e-6)  # a pair without masks
    assert found[0].item() != pytest.approx(residual[0].pow(2).mean().item(), rel=1e-3)
    leaf = residual.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean_squares(batch, leaf).sum(), leaf)
    torch.testing.assert_close(mean_squares_gradient(batch, residual), gradient)
    rows = mean_squares(batch, residual[batch.rejected_rows], batch.rejected_rows)
    assert torch.equal(rows, found[2:])


def test_what_a_mask_covers_has_no_influence(new_run: Run, masked_pairs: list[dict[str, Any]]) -> None:
    session = prepared(new_run("covered", pairs=masked_pairs))
    batch = batch_of(session, [1])
    assert batch.mask is not None
    residual = torch.randn(2, 4, 8, 8)
    changed = residual + 7 * (batch.mask == 0)
    assert (batch.mask == 0).any()
    assert torch.equal(mean_squares(batch, residual), mean_squares(batch, changed))


def test_a_floor_lets_the_rest_count_a_little(new_run: Run, masked_pairs: list[dict[str, Any]]) -> None:
    plain = batch_of(prepare(new_run("floor-0", pairs=masked_pairs), None, None), [1]).mask
    floor = batch_of(prepare(new_run("floor", pairs=masked_pairs, loss={"mask_floor": 0.25}), None, None), [1]).mask
    assert plain is not None
    assert floor is not None
    torch.testing.assert_close(floor, 0.25 + 0.75 * plain)
    assert plain.min() == 0


def test_masks_off_and_sets_without_masks_train_everything(
    new_run: Run, masked_pairs: list[dict[str, Any]], drawn_pairs: list[dict[str, Any]]
) -> None:
    off = prepare(new_run("mask-off", pairs=masked_pairs, loss={"mask": "off"}), None, None)
    assert batch_of(off, [1, 2]).mask is None
    assert batch_of(prepare(new_run("no-masks", pairs=drawn_pairs), None, None), [1, 2]).mask is None


def test_transparency_as_a_mask(new_run: Run, drawn_pairs: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="no image has transparent parts"):
        prepare(new_run("alpha-none", pairs=drawn_pairs, loss={"mask": "alpha"}), None, None)
    records = [dict(r) for r in drawn_pairs]
    with Image.open(records[1]["chosen"]) as image:
        pixels = np.dstack([np.asarray(image.convert("RGB")), np.full((48, 48), 255, dtype=np.uint8)])
    pixels[:, :24, 3] = 0
    records[1]["chosen"] = str(tmp_path / "half.png")
    Image.fromarray(pixels).save(records[1]["chosen"])
    mask = batch_of(prepare(new_run("alpha", pairs=records, loss={"mask": "alpha"}), None, None), [1, 2]).mask
    assert mask is not None
    assert mask[0, 0, :, :3].max() < 0.05
    assert mask[0, 0, :, 5:].min() > 0.95
    assert mask[1:].min() == 1
    assert batch_of(prepare(new_run("alpha-file", pairs=records), None, None), [1, 2]).mask is None


def test_a_mask_that_cannot_be_right_stops_before_training(
    new_run: Run, masked_pairs: list[dict[str, Any]], tmp_path: Path
) -> None:
    for name, values, message in (
        ("black", np.zeros((48, 48)), "black everywhere"),
        ("shape", np.full((48, 24), 255), "must have the same shape"),
    ):
        path = tmp_path / f"{name}.png"
        Image.fromarray(values.astype(np.uint8)).save(path)
        wrong = [{**r, "chosen_mask": str(path)} if i == 1 else r for i, r in enumerate(masked_pairs)]
        with pytest.raises(PairsError, match=message):
            prepare(new_run(f"mask-{name}", pairs=wrong), None, None)


# --- what reaches the loss


@pytest.mark.parametrize("method", ["sft", "mapo", "dreambooth"])
def test_weights_by_noise_level_reach_the_gradient(new_run: Run, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    settings = METHODS[method] | ({"margin_weight": 0.0} if method == "mapo" else {})
    run = new_run(f"snr-{method}", method=settings, loss={"snr_weighting": "min_snr", "min_snr_gamma": 1.0})
    session = prepared(run)
    seen: list[Any] = []
    real = backward.pulls_of

    def keep(*arguments: Any) -> Any:
        seen.append((arguments, real(*arguments)))
        return seen[-1][1]

    monkeypatch.setattr(backward, "pulls_of", keep)
    backward_batch(session, [Draw(0, 1), Draw(1, 1), Draw(2, 1)], 3)
    ((_, _, batch, of_class, *_), (pulls, _)) = seen[0]
    alphas = session.model.noise_scheduler.alphas_cumprod
    for name, rows in (("chosen_mse", batch), ("class_mse", of_class)):
        if rows is not None:
            expected = snr_weights(alphas, torch.tensor(rows.levels[:3]), "min_snr", 1.0, False) / 3
            torch.testing.assert_close(pulls[name], expected)
            assert expected.min() < 0.9 / 3


def test_label_noise_turns_pairs_round(new_run: Run, drawn_pairs: list[dict[str, Any]]) -> None:
    records = [{**r, "rejected_prompt": "a plain picture"} for r in drawn_pairs]
    right = prepare(new_run("votes", pairs=records), None, None)
    wrong = prepare(new_run("wrong-votes", pairs=records, loss={"label_noise": 1.0}), None, None)
    a = backward_batch(right, [Draw(0, 1), Draw(1, 1)], 2)
    b = backward_batch(wrong, [Draw(0, 1), Draw(1, 1)], 2)
    assert a["chosen_mse"].item() == pytest.approx(b["rejected_mse"].item(), rel=1e-5)
    assert a["rejected_mse"].item() == pytest.approx(b["chosen_mse"].item(), rel=1e-5)
    assert a["chosen_mse"].item() != pytest.approx(a["rejected_mse"].item(), rel=1e-3)


def test_the_noise_of_both_images_is_shaped_alike(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    session = prepare(new_run("shaped", loss={"noise_offset": 0.5, "multires_noise_levels": 4}), None, None)
    seen: list[PairBatch] = []
    real = backward.fixed_errors

    def watch(model: Any, family: Any, batch: PairBatch, *rest: Any, **more: Any) -> Any:
        seen.append(batch)
        return real(model, family, batch, *rest, **more)

    monkeypatch.setattr(backward, "fixed_errors", watch)
    backward_batch(session, [Draw(0, 1), Draw(1, 1)], 2)
    (batch,) = seen
    assert torch.equal(batch.target[:2], batch.target[2:])
    again = session.model.noise_scheduler.add_noise(batch.latents, batch.target, batch.timesteps)
    torch.testing.assert_close(again, batch.noisy)


# --- equalities


@pytest.mark.parametrize("method", ["mapo", "dreambooth"])
def test_with_everything_on_nothing_depends_on_how_a_step_is_cut(
    new_run: Run, masked_pairs: list[dict[str, Any]], method: str
) -> None:
    settings = {"pairs": masked_pairs, "method": METHODS[method], "loss": EVERYTHING, "data": {"flip": True}}
    found = [
        first_gradients(
            new_run(
                f"all-{method}-{batch}",
                training={"train_batch_size": batch, "gradient_accumulation_steps": 4 // batch},
                **settings,
            )
        )
        for batch in (1, 4)
    ]
    scale = max(g.abs().max() for g in found[1])
    assert max((a - b).abs().max() for a, b in zip(*found, strict=True)) / scale < 1e-5


@pytest.mark.parametrize("method", ["mapo", "diffusion_dpo"])
def test_with_masks_both_forms_have_the_same_gradients(
    new_run: Run, masked_pairs: list[dict[str, Any]], method: str
) -> None:
    form = {**METHODS[method], "safeguard": True, "label_smoothing": 0.1}
    loss = {**EVERYTHING, "snr_weighting": "min_snr" if method == "mapo" else "none"}
    session = prepared(new_run(f"masked-split-{method}", pairs=masked_pairs, method=form, loss=loss))
    joint, split = step_of(session, split=False), step_of(session, split=True)
    assert (joint[1] - split[1]).abs().max() / joint[1].abs().max() < 1e-5
    assert 0 <= joint[0]["safeguard/lambda"] <= 4


def test_with_everything_on_a_run_resumes_bit_for_bit(new_run: Run, masked_pairs: list[dict[str, Any]]) -> None:
    settings = {
        "pairs": masked_pairs,
        "method": {"type": "mapo", "safeguard": True, "label_smoothing": 0.1},
        "loss": EVERYTHING,
        "training": {"steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 1},
        "data": {"flip": True, "caption_dropout": 0.3},
    }
    whole, parts = new_run("all-whole", **settings), new_run("all-parts", **settings)
    run_here(whole)
    run_here(parts, before_training=stop_after(parts, 1))
    run_here(parts)
    a, b = lora_of(whole), lora_of(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [[e["loss"] for e in read_events(r.events) if e["type"] == "step"] for r in (whole, parts)]
    assert losses[0] == losses[1]
    assert all("safeguard/lambda" in e for e in read_events(whole.events) if e["type"] == "step")


def test_a_pairs_weight_is_a_factor_on_its_gradient(new_run: Run, drawn_pairs: list[dict[str, Any]]) -> None:
    def gradient(weights: dict[int, float], indices: list[int]) -> torch.Tensor:
        records = [{**r, "weight": weights.get(i, 1.0)} for i, r in enumerate(drawn_pairs)]
        name = "weights-" + "-".join(map(str, [*weights, *indices]))
        session = prepared(new_run(name, pairs=records, method=METHODS["mapo"]))
        draws = [Draw(0, session.train_indices.index(i)) for i in indices]
        backward_batch(session, draws, len(draws))
        return torch.cat([p.grad.flatten() for p in session.parameters if p.grad is not None])

    session = prepare(new_run("weights"), None, None)
    one, two = [i for i in session.train_indices if i % 3][:2]  # of one size
    both = gradient({one: 0.5, two: 2.0}, [one, two])
    expected = (0.5 * gradient({}, [one]) + 2.0 * gradient({}, [two])) / 2
    assert (both - expected).abs().max() / expected.abs().max() < 1e-5
