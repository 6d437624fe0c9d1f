"""Every kind of adapter and choice of layers trains, and comes out of its file as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mapo_core import ConfigError
from mapo_core.adapter import add_lora, lora_strength
from mapo_core.adapter_config import place_adapters
from mapo_core.components import UNET
from mapo_core.config import build_config
from mapo_core.export import load_lora
from mapo_core.families import FAMILIES
from mapo_core.lora_check import _predict
from mapo_core.reopen import open_trained
from mapo_core.runs import read_events
from mapo_core.sections import AdapterConfig, ModelConfig
from mapo_core.session import prepare
from mapo_core.trainer import loop

from .conftest import Run, lora_of, run_here

SDXL = FAMILIES["sdxl"]
ALL = ["attention", "feed_forward", "conv"]


@pytest.mark.parametrize("kind", ["rslora", "dora", "loha", "lokr"])
def test_each_kind_trains_resumes_and_reloads(new_run: Run, kind: str) -> None:
    """Loss and adapter change and nothing else does; a resumed run is the same run; the file is the trained adapter."""
    settings: dict[str, Any] = {
        "adapter": {"type": kind, "rank": 2, "targets": ALL, "dropout": 0.1},
        "optimizer": {"learning_rate": 1e-2},
        "training": {"steps": 3, "train_batch_size": 2, "gradient_accumulation_steps": 1},
        "checkpoint": {"every_steps": 2, "keep": 5},
    }
    session = prepare(new_run(f"looked-at-{kind}", **settings), None, None)
    names = {n for n, p in session.model.unet.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in session.model.unet.named_parameters()}
    with session.autocast():
        assert torch.equal(_predict(session.model, []), _predict(session.model, ["default"]))  # starts at the base
    loop(session)
    after = dict(session.model.unet.named_parameters())
    assert all(torch.equal(before[n], after[n]) for n in before if n not in names)
    changed = [n for n in names if not torch.equal(before[n], after[n])]
    assert len(changed) > 0.9 * len(names)

    run = new_run(f"whole-{kind}", **settings)
    run_here(run)
    losses = [e["loss"] for e in read_events(run.events) if e["type"] == "step"]
    assert len(set(losses)) == 3
    resumed = new_run(f"parts-{kind}", **{**settings, "training": {**settings["training"], "steps": 2}})
    run_here(resumed)
    resumed.config.write_text(resumed.config.read_text().replace('"steps": 2', '"steps": 3'))
    run_here(resumed)
    a, b = lora_of(run), lora_of(resumed)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)

    trained = open_trained(run)
    live = _predict(trained.model, ["default"])
    other = SDXL.load(ModelConfig(path=trained.config.model.path))
    base = _predict(other, [])
    file = load_lora(other, SDXL, run.export / f"{run.name}.safetensors", "compare")
    assert file.kind == kind.replace("rslora", "lora")
    effect = (live - base).norm()
    assert effect > 0
    assert (_predict(other, ["compare"]) - live).norm() < 0.01 * effect


def config_of(**adapter: Any) -> AdapterConfig:
    return build_config(
        {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p.jsonl"}, "adapter": adapter}
    ).adapter


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return SDXL.load(ModelConfig(path=str(tiny_model)), encoders=False)


def test_layers_by_expression_and_ranks_and_alphas_by_pattern(model: Any) -> None:
    config = config_of(
        rank=8,
        target_pattern=r"attn2|^mid_block.*conv",
        rank_pattern=["conv=2", "to_out|conv1=3"],
        alpha_pattern=["to_k=1.5"],
    )
    (placement,) = place_adapters(model, SDXL, config, [UNET])
    assert all("attn2" in n or "conv" in n for n in placement.ranks)
    convolutions = {f"mid_block.resnets.{i}.conv{k}" for i in (0, 1) for k in (1, 2)}
    assert {n for n in placement.ranks if "conv" in n} == convolutions
    expected = {n: 2 if "conv" in n else 3 if "to_out" in n else 8 for n in placement.ranks}
    assert placement.ranks == expected
    assert placement.alphas == {n: 1.5 if "to_k" in n else float(expected[n]) for n in expected}
    add_lora(model, SDXL, config, 0)
    for name, layer in model.unet.named_modules():
        if name in expected:
            assert layer.lora_A["default"].weight.shape[0] == expected[name]
            assert layer.scaling["default"] == pytest.approx(placement.alphas[name] / expected[name])


def test_kohyas_conv_dim(model: Any) -> None:
    """What the settings' text says: every convolution, and nothing of the attention."""
    config = config_of(rank=8, targets=ALL, rank_pattern=["conv=4", "time_emb_proj=4"])
    (placement,) = place_adapters(model, SDXL, config, [UNET])
    conv = set(place_adapters(model, SDXL, config_of(targets=["conv"]), [UNET])[0].ranks)
    assert conv
    assert {n for n, rank in placement.ranks.items() if rank == 4} == conv


WRONG = [
    ({"target_pattern": "attn3"}, "'attn3' is found in no layer's name"),
    ({"rank_pattern": ["ff.net=4"]}, "rank_pattern: 'ff.net' is found in the name of no layer"),
    ({"alpha_pattern": ["conv=4"]}, "alpha_pattern: 'conv' is found in the name of no layer"),
]


@pytest.mark.parametrize(("adapter", "message"), WRONG)
def test_a_pattern_without_a_layer_is_an_error(model: Any, adapter: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        place_adapters(model, SDXL, config_of(**adapter), [UNET])


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"target_pattern": "attn("}, "not a regular expression"),
        ({"rank_pattern": ["attn2"]}, "not of the form"),
        ({"rank_pattern": ["attn2=1.5"]}, "whole number"),
        ({"alpha_pattern": ["attn2=0"]}, "above 0"),
    ],
)
def test_patterns_are_checked_with_the_settings(adapter: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**adapter)


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_strength_is_a_share_of_the_change(model: Any, kind: str) -> None:
    """As in ComfyUI: half of the way from the base weights to the trained ones, also where DoRA rescales them."""
    add_lora(model, SDXL, config_of(rank=2, type=kind, target_pattern="mid_block.*attn1.to_q"), 0)
    draw = torch.Generator().manual_seed(0)
    for parameter in (p for p in model.unet.parameters() if p.requires_grad):
        parameter.data += torch.randn(parameter.shape, generator=draw)
    model.unet.eval()
    layer = dict(model.unet.named_modules())["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    x = torch.randn(3, layer.in_features, generator=draw)
    base, whole = layer.get_base_layer()(x), layer(x)
    with lora_strength(model, 0.5):
        assert torch.allclose(layer(x), base + 0.5 * (whole - base), atol=1e-5)
    assert torch.equal(layer(x), whole)
