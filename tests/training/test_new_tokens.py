"""New words: only their vectors change, the reference reads the class word, and the files are what ComfyUI loads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mapo_core import ConfigError, build_config
from mapo_core.adapter import encode_prompts
from mapo_core.families import FAMILIES
from mapo_core.new_tokens import class_prompt, token_state
from mapo_core.reopen import compare_run, export_run, open_trained
from mapo_core.runs import read_events
from mapo_core.sections import ModelConfig
from mapo_core.session import prepare
from mapo_core.trainer import loop

from .conftest import Run, lora_of, run_here

SDXL = FAMILIES["sdxl"]
TOKENS = {"new_tokens": ["<toy>=star"], "new_token_vectors": 2, "new_token_learning_rate": 0.01, "rank": 2}


@pytest.fixture
def toys(drawn_pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**r, "prompt": f"a photo of <toy>, {r['prompt']}"} for r in drawn_pairs]


def test_only_the_new_vectors_of_the_text_encoders_change(new_run: Run, toys: list[dict[str, Any]]) -> None:
    session = prepare(new_run("words", pairs=toys, adapter=TOKENS), None, None)
    assert [(g.name, g.learning_rate) for g in session.groups] == [("unet", None), ("new_tokens", 0.01)]
    encoders = session.model.text_encoders
    before = [{n: p.detach().clone() for n, p in e.named_parameters()} for e in encoders]
    start = {n: t.clone() for n, t in token_state(session.model).items()}
    assert {n: tuple(t.shape) for n, t in start.items()} == {f"text_encoder{x}.new_tokens": (2, 16) for x in ("", "_2")}
    loop(session)
    for encoder, old in zip(encoders, before, strict=True):
        for name, parameter in encoder.named_parameters():
            assert torch.equal(old[name], parameter) == (not name.endswith("vectors")), name
    for name, vectors in token_state(session.model).items():
        assert (vectors - start[name]).abs().max() > 1e-3
        assert not torch.equal(vectors[0], vectors[1])


def test_words_are_read_as_the_words_they_start_from(new_run: Run, toys: list[dict[str, Any]]) -> None:
    """Before the first step a placeholder is its class word, for trained and reference network alike."""
    settings = {**TOKENS, "new_token_vectors": 1}
    session = prepare(new_run("start", pairs=toys, adapter=settings), None, None)
    prompt = "a photo of <toy>, in a box"
    fresh = SDXL.load(ModelConfig(path=session.config.model.path))
    (expected,) = SDXL.encode_prompts(fresh, [class_prompt(prompt, settings["new_tokens"])])
    assert class_prompt(prompt, settings["new_tokens"]) == "a photo of star, in a box"
    for base in (False, True):
        (found,) = encode_prompts(session.model, SDXL, [prompt], base=base)
        assert all(torch.allclose(found[n], expected[n], atol=1e-6) for n in expected), base
    for vectors in token_state(session.model).values():
        vectors += torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))  # a constant the norm undoes
    (live,) = encode_prompts(session.model, SDXL, [prompt], base=False)
    (base_model,) = encode_prompts(session.model, SDXL, [prompt], base=True)
    assert not torch.allclose(live["prompt_embeds"], expected["prompt_embeds"], atol=1e-2)
    assert not torch.allclose(live["pooled_prompt_embeds"], expected["pooled_prompt_embeds"], atol=1e-2)
    (word,) = encode_prompts(session.model, SDXL, ["a photo of star, in a box"], base=True)
    assert all(torch.equal(base_model[n], word[n]) for n in word)


def test_a_run_resumes_draws_and_writes_embeddings(new_run: Run, toys: list[dict[str, Any]]) -> None:
    settings: dict[str, Any] = {
        "pairs": toys,
        "adapter": {**TOKENS, "text_encoder": True},
        "method": {"type": "dco", "beta": 50.0},
        "training": {"steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 1},
        "checkpoint": {"every_steps": 2, "keep": 5},
    }
    whole = new_run("whole", **settings)
    run_here(whole)
    parts = new_run("parts", **{**settings, "training": {**settings["training"], "steps": 2}})
    run_here(parts)
    parts.config.write_text(parts.config.read_text().replace('"steps": 2', '"steps": 3'))
    run_here(parts)
    a, b = lora_of(whole), lora_of(parts)
    assert {"text_encoder.new_tokens", "text_encoder_2.new_tokens"} <= a.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(e.get("embedding") == f"{whole.name}-toy.safetensors" for e in read_events(whole.events))
    embedding = load_file(whole.export / f"{whole.name}-toy.safetensors")
    assert torch.equal(embedding["clip_l"], a["text_encoder.new_tokens"])
    assert torch.equal(embedding["clip_g"], a["text_encoder_2.new_tokens"])
    assert compare_run(whole, prompts=["a photo of <toy>"]).exists()
    path = export_run(whole, step=2, precision="fp32")
    assert path.with_name(f"{path.stem}-toy.safetensors").exists()
    trained = open_trained(whole)
    assert all(torch.equal(t, a[n]) for n, t in token_state(trained.model).items())


def test_a_word_that_no_prompt_has_is_an_error(new_run: Run) -> None:
    with pytest.raises(ConfigError, match="no prompt of the pairs has <toy>"):
        prepare(new_run("none", adapter=TOKENS), None, None)


@pytest.mark.parametrize("entry", ["<toy>", "=toy", "<toy>=", "a toy=toy"])
def test_entries_are_checked_with_the_settings(entry: str) -> None:
    with pytest.raises(ConfigError, match="not of the form placeholder=word"):
        build_config(
            {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p"}, "adapter": {"new_tokens": [entry]}}
        )
