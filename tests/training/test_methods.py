"""What some methods need beside the two errors: class images, base prompts, scores, inversion under autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

import mapo_core.backward as backward
import mapo_core.batch as batch
import mapo_core.class_images as class_images
from mapo_core.backward import assemble_class, backward_batch
from mapo_core.data_order import Draw
from mapo_core.errors import PairsError
from mapo_core.noising import inversion_levels
from mapo_core.runs import read_events
from mapo_core.session import prepare

from .conftest import Run, lora_of, run_here
from .test_equalities import METHODS, first_gradients, stop_after


@pytest.mark.parametrize("method", ["dco", "dreambooth", "inpo", "smpo"])
def test_stopping_and_resuming_gives_the_weights_of_an_uninterrupted_run(new_run: Run, method: str) -> None:
    settings = {
        "method": METHODS[method],
        "training": {"steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 1},
        "adapter": {"dropout": 0.2},
        "data": {"flip": True, "caption_dropout": 0.3},
    }
    whole = new_run(f"whole-{method}", **settings)
    run_here(whole)
    parts = new_run(f"parts-{method}", **settings)
    run_here(parts, before_training=stop_after(parts, 1))
    assert parts.latest_checkpoint().name == "step_00000001"
    run_here(parts)
    a, b = lora_of(whole), lora_of(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [[e["loss"] for e in read_events(r.events) if e["type"] == "step"] for r in (whole, parts)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("method", ["inpo", "smpo"])
def test_inversion_under_autocast_leaves_the_loras_gradients_alone(new_run: Run, method: str, autocast: bool) -> None:
    found: list[torch.Tensor] = []
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        training = {"precision": precision, "train_batch_size": 4, "gradient_accumulation_steps": 1}
        training["autocast"] = autocast
        gradients = first_gradients(new_run(f"{method}-{precision}", method=METHODS[method], training=training))
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.9


@pytest.mark.parametrize("method", ["inpo", "smpo"])
def test_the_noise_that_inversion_finds_leads_from_the_latents_to_x_t(
    new_run: Run, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    session = prepare(new_run(f"noise-{method}", method=METHODS[method]), None, None)
    seen: list[batch.PairBatch] = []
    real = backward.fixed_errors

    def watch(model: Any, family: Any, found: batch.PairBatch, *rest: Any) -> Any:
        seen.append(found)
        return real(model, family, found, *rest)

    monkeypatch.setattr(backward, "fixed_errors", watch)
    backward_batch(session, [Draw(0, 1), Draw(1, 1)], 2)
    (found,) = seen
    assert set(found.levels) <= set(inversion_levels(session.loss.inversion.steps, 1000))
    assert found.levels[:2] == found.levels[2:]  # both images of a pair
    again = session.model.noise_scheduler.add_noise(found.latents, found.target, found.timesteps)
    torch.testing.assert_close(again, found.noisy, rtol=1e-4, atol=1e-4)


def test_class_images_are_drawn_once_and_a_missing_one_is_drawn_again(
    new_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    real = class_images.sample_images

    def counting(model: Any, family: Any, prompts: Any, negative: Any, seeds: list[int], **settings: Any) -> Any:
        drawn.extend(seeds)
        return real(model, family, prompts, negative, seeds, **settings)

    monkeypatch.setattr(class_images, "sample_images", counting)
    method = {"type": "dreambooth", "class_prompt": "a heart", "class_images": 3}
    session = prepare(new_run("first", method=method), None, None)
    assert drawn == [class_images.class_seed(n) for n in range(3)]
    paths = [e.chosen.path for e in session.class_images.entries]
    assert [p.name for p in paths] == ["00000.png", "00001.png", "00002.png"]
    assert {e.prompt for e in session.class_images.entries} == {"a heart"}
    before = [p.read_bytes() for p in paths]
    drawn.clear()
    prepare(new_run("second", method=method, seed=7), None, None)
    assert drawn == []
    paths[1].unlink()
    prepare(new_run("third", method={**method, "class_images": 4}), None, None)
    assert drawn == [class_images.class_seed(n) for n in (1, 3)]
    assert [p.read_bytes() for p in paths] == before
    prepare(new_run("other", method={**method, "class_prompt": "a moon", "class_images": 1}), None, None)
    assert len(drawn) == 3


def test_a_class_image_has_its_own_prompt_noise_and_timestep(new_run: Run) -> None:
    session = prepare(new_run("own", method=METHODS["dreambooth"]), None, None)
    draws = [Draw(e, i) for e in range(3) for i in range(4)]
    of_class = assemble_class(session, draws, [d.index for d in draws])
    assert len(of_class.noisy) == len(draws)
    assert len(set(of_class.levels)) > 6
    again = assemble_class(session, draws[5:6], [draws[5].index])
    assert torch.equal(again.noisy[0], of_class.noisy[5])
    assert again.levels[0] == of_class.levels[5]
    prompt = session.class_images.prompt("a star")["prompt_embeds"]
    assert all(torch.equal(embeds, prompt) for embeds in of_class.conditions["prompt_embeds"])
    shown = {round(latents.sum().item(), 3) for latents in of_class.latents}
    assert len(shown) > 3  # 3 images, each with its own sample of the posterior


def test_the_prior_weight_changes_the_gradient_and_zero_is_sft(new_run: Run) -> None:
    def gradients(name: str, **method: Any) -> torch.Tensor:
        return torch.cat([g.flatten() for g in first_gradients(new_run(name, method=method))])

    sft = gradients("sft", type="sft")
    none = gradients("without", **METHODS["dreambooth"], prior_weight=0.0)
    some = gradients("with", **METHODS["dreambooth"], prior_weight=1.0)
    scale = sft.abs().max()
    assert (none - sft).abs().max() / scale < 1e-5
    assert (some - sft).abs().max() / scale > 1e-2


def test_dcos_reference_sees_the_base_prompt(new_run: Run, drawn_pairs: list[dict[str, Any]]) -> None:
    def base_error(name: str, **fields: str) -> tuple[float, float]:
        pairs = [{**r, **fields} for r in drawn_pairs]
        session = prepare(new_run(name, pairs=pairs, method=METHODS["dco"]), None, None)
        values: dict[str, float] = {}
        real: Any = session.loss

        class Watched:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def __call__(self, **errors: torch.Tensor) -> Any:
                values.update({k: v.sum().item() for k, v in errors.items()})
                return real(**errors)

        session.loss = Watched()  # pyright: ignore[reportAttributeAccessIssue]
        backward_batch(session, [Draw(0, 1), Draw(1, 1)], 2)
        return values["chosen_mse"], values["chosen_mse_base"]

    same = base_error("same-prompt")
    other = base_error("base-prompt", base_prompt="a small blue boat at the top, white background")
    assert same[0] == same[1]  # a fresh LoRA is the base model
    assert other[0] == same[0]
    assert other[1] != same[1]


def test_smpo_without_scores_stops_before_the_model_is_loaded(
    new_run: Run, drawn_pairs: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = [{k: v for k, v in r.items() if not k.endswith("_score")} for r in drawn_pairs]
    run = new_run("bare", pairs=bare, method=METHODS["smpo"])

    def refuse(*args: Any, **settings: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("mapo_core.families.sdxl.SDXL.load", refuse)
    with pytest.raises(PairsError, match="12 of 12 pairs have none, the first is pair 1"):
        run_here(run)


def test_class_images_lie_below_the_home(new_run: Run, shared_home: Path) -> None:
    prepare(new_run("home", method=METHODS["dreambooth"]), None, None)
    folders = list((shared_home / "class_images").iterdir())
    assert any((f / "about.json").exists() and (f / "00002.png").exists() for f in folders)
