"""Training the text encoders: gradients reach them, equal cuts give equal gradients, and their LoRA is in the file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mapo_core.adapter import adapter_off, encode_prompts
from mapo_core.data_order import step_groups
from mapo_core.export import export_lora, load_lora
from mapo_core.families import FAMILIES
from mapo_core.lora_adapter import adapted_layers
from mapo_core.reopen import compare_run, open_trained
from mapo_core.runs import read_events
from mapo_core.sections import ModelConfig
from mapo_core.session import prepare
from mapo_core.trainer import loop

from .conftest import Run, lora_of, run_here

SDXL = FAMILIES["sdxl"]
TEXT = {"text_encoder": True, "rank": 2, "targets": ["attention", "feed_forward"]}
LONG = "a red boat on a lake " * 25
UNREAD = ".layers.1."  # SDXL reads the first encoder's states before its last layer, the second of two here
DPO = {"type": "diffusion_dpo", "beta": 100.0}


def with_long_prompt(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**r, "prompt": LONG} if i % 4 == 1 else r for i, r in enumerate(pairs)]


def first_gradients(run: Any) -> list[torch.Tensor]:
    from mapo_core.backward import accumulate

    session = prepare(run, None, None)
    generator = torch.Generator().manual_seed(0)
    for parameter in session.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    session.step = 1
    buckets = [session.pairs.entries[i].bucket for i in session.train_indices]
    accumulate(session, next(step_groups(buckets, 4, session.config.seed)), buckets)
    assert {g.name for g in session.groups} == {"unet", "text_encoder", "text_encoder_2"}
    idle = [n for g in session.groups for n, p in g.parameters.items() if p.grad is None]
    assert all(UNREAD in n for n in idle)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in session.parameters]


@pytest.mark.parametrize("method", [{"type": "mapo", "logit_scale": 100.0}, DPO], ids=["mapo", "dpo"])
def test_gradients_of_the_text_encoders_do_not_depend_on_the_cut(
    new_run: Run, drawn_pairs: list[dict[str, Any]], method: dict[str, Any]
) -> None:
    """Batches of 4, 2 and 1, split pairs and checkpointing give the same gradients."""
    cuts = {
        "4": {"training": {"train_batch_size": 4, "gradient_accumulation_steps": 1}},
        "1": {"training": {"train_batch_size": 1, "gradient_accumulation_steps": 4}},
        "split": {
            "training": {"train_batch_size": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
            "memory": {"split_pairs": "on"},
        },
    }
    found = {
        name: first_gradients(
            new_run(f"{method['type']}-{name}", pairs=with_long_prompt(drawn_pairs), adapter=TEXT, method=method, **cut)
        )
        for name, cut in cuts.items()
    }
    scale = max(g.abs().max() for g in found["1"])
    for name in ("4", "split"):
        worst = max((a - b).abs().max() for a, b in zip(found[name], found["1"], strict=True))
        assert worst / scale < 2e-5, name


def test_a_run_trains_measures_resumes_and_exports_them(new_run: Run) -> None:
    settings: dict[str, Any] = {
        "adapter": {**TEXT, "dropout": 0.1, "text_encoder_learning_rate": 5e-3},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 1},
        "checkpoint": {"every_steps": 2, "keep": 5},
        "validation": {"every_steps": 2},
    }
    whole = new_run("whole", **settings)
    run_here(whole)
    parts = new_run("parts", **{**settings, "training": {**settings["training"], "steps": 2}})
    run_here(parts)
    parts.config.write_text(parts.config.read_text().replace('"steps": 2', '"steps": 3'))
    run_here(parts)
    a, b = lora_of(whole), lora_of(parts)
    assert {k.partition(".")[0] for k in a} >= {"text_encoder", "text_encoder_2", "mid_block"}
    assert all(torch.equal(a[k], b[k]) for k in a)
    idle = [k for k in a if "lora_B" in k and a[k].abs().max() == 0]
    assert all(k.startswith("text_encoder.") and UNREAD in k for k in idle)

    events = read_events(whole.events)
    measured = [e for e in events if e["type"] == "evaluated"]
    assert measured[0]["chosen_mse"] == measured[0]["base"]["chosen_mse"]
    assert measured[-1]["chosen_mse"] != measured[-1]["base"]["chosen_mse"]
    assert compare_run(whole, prompts=["a star"]).exists()

    keys = set(load_file(whole.export / f"{whole.name}.safetensors"))
    assert {k.partition("_text_model")[0] for k in keys if k.startswith("lora_te")} == {"lora_te1", "lora_te2"}
    trained = open_trained(whole)
    prompts = ["a star", LONG]
    live = encode_prompts(trained.model, trained.family, prompts, base=False)
    plain = encode_prompts(trained.model, trained.family, prompts, base=True)
    for layout in ("kohya", "diffusers"):
        path = whole.export / f"{layout}.safetensors"
        export_lora(trained.model, SDXL, path, layout=layout, precision="fp32")
        other = SDXL.load(ModelConfig(path=trained.config.model.path))
        SDXL.pipeline(other).load_lora_weights(str(path))  # as any user of diffusers would
        for ours, theirs, base in zip(live, SDXL.encode_prompts(other, prompts), plain, strict=True):
            for name in ours:
                assert torch.allclose(ours[name], theirs[name], atol=1e-5), (layout, name)
                assert not torch.allclose(ours[name], base[name], atol=1e-3), (layout, name)
    other = SDXL.load(ModelConfig(path=trained.config.model.path))
    load_lora(other, SDXL, whole.export / "kohya.safetensors", "mine")
    assert adapted_layers(other, "mine").keys() == adapted_layers(trained.model, "default").keys()


def test_only_the_lora_changes_and_a_rate_of_zero_leaves_an_encoder_out(new_run: Run) -> None:
    run = new_run("one", adapter={**TEXT, "text_encoder_2_learning_rate": 0.0, "text_encoder_learning_rate": 1e-4})
    session = prepare(run, None, None)
    assert [(g.name, g.learning_rate) for g in session.groups] == [("unet", None), ("text_encoder", 1e-4)]
    model = session.model
    before = [{n: p.detach().clone() for n, p in e.named_parameters()} for e in model.text_encoders]
    loop(session)
    for encoder, old in zip(model.text_encoders, before, strict=True):
        for name, parameter in encoder.named_parameters():
            if "lora_" in name and UNREAD in name:
                continue
            assert torch.equal(old[name], parameter) == ("lora_" not in name), name
    assert not any("lora_" in n for n in before[1])
    assert all(p.dtype == torch.float32 for p in session.parameters)


def test_the_reference_reads_prompts_without_the_adapter(new_run: Run) -> None:
    """The cache has the base model's embeddings, also when they are encoded with a trained adapter on the model."""
    session = prepare(new_run("reference", adapter=TEXT), None, None)
    draw = torch.Generator().manual_seed(0)
    for parameter in session.parameters:
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    fresh = SDXL.load(ModelConfig(path=session.config.model.path))
    prompt = "a prompt that no other test has"
    session.prompts.encode(session.model, SDXL, [prompt], lambda *_: None)
    (expected,) = SDXL.encode_prompts(fresh, [prompt])
    stored = session.prompts.get(prompt)
    assert all(torch.equal(stored[n], expected[n]) for n in expected)
    (live,) = SDXL.encode_prompts_live(session.model, [prompt])
    assert not torch.allclose(live["prompt_embeds"], expected["prompt_embeds"], atol=1e-3)
    assert live["prompt_embeds"].requires_grad

    from mapo_core.batch import assemble, row_conditions
    from mapo_core.evaluate.held_out import fixed_randomness

    i = session.train_indices[0]
    drawn = fixed_randomness(session.pairs, i, 0, 1, 1000, 0)
    batch = assemble(session.pairs, [i], [drawn], session.model, SDXL, paired=True)
    trained = row_conditions(session.model, SDXL, batch, slice(None))["prompt_embeds"]
    reference = row_conditions(session.model, SDXL, batch, slice(None), reference="prompt")["prompt_embeds"]
    with adapter_off(session.model.unet):
        off = row_conditions(session.model, SDXL, batch, slice(None))["prompt_embeds"]
    assert torch.equal(reference, off)
    assert not torch.allclose(trained, reference, atol=1e-3)
