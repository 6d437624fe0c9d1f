"""Every kind of adapter in a file: what ComfyUI's arithmetic makes of it is what peft's layer adds to its weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mapo_core.comfy_weights import comfyui_change
from mapo_core.errors import ExportError
from mapo_core.export import export_lora, load_lora, read_lora, verify_lora
from mapo_core.families import FAMILIES, DiffusionModel
from mapo_core.lora_adapter import adapted_layers
from mapo_core.lora_file import read_modules

from .test_export import ALL, fresh, predict

SDXL = FAMILIES["sdxl"]
TARGETS = SDXL.target_modules(ALL)
KINDS: dict[str, Any] = {
    "rslora": LoraConfig(r=4, lora_alpha=2, use_rslora=True, rank_pattern={"conv1": 2}, target_modules=TARGETS),
    "dora": LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=TARGETS),
    "loha": LoHaConfig(r=4, alpha=2, rank_pattern={"conv1": 2}, target_modules=TARGETS),
    "lokr": LoKrConfig(r=2, alpha=1, alpha_pattern={"to_q": 5}, target_modules=TARGETS),
    "lokr, both halved": LoKrConfig(r=1, alpha=3, decompose_both=True, decompose_factor=8, target_modules=TARGETS),
    "lokr, whole": LoKrConfig(r=64, alpha=24, target_modules=TARGETS),
}


def trained(kind: str) -> DiffusionModel:
    """With an adapter as if it had been trained."""
    model = fresh()
    inject_adapter_in_model(KINDS[kind], model.unet)
    draw = torch.Generator().manual_seed(3)
    for key, parameter in model.unet.named_parameters():
        if ".default" in key:
            noise = torch.randn(parameter.shape, generator=draw)
            parameter.data = parameter * (1 + 0.1 * noise) if "magnitude" in key else noise * 0.3
    return model


def effective(layer: Any, weight: Tensor) -> Tensor:
    """The weight that a bias-free layer acts with: what it makes of the unit vectors."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Conv2d):
        size = base.kernel_size[0]
        basis = torch.eye(weight[0].numel()).reshape(-1, *weight.shape[1:])  # one input patch per weight
        padding, stride = base.padding, base.stride
        base.padding, base.stride = (0, 0), (1, 1)
        for part in (layer.lora_A, layer.lora_B) if hasattr(layer, "lora_A") else ():
            part["default"].padding, part["default"].stride = (0, 0), (1, 1)
        assert basis.shape[-1] == size
        result = layer(basis)[:, :, 0, 0]
        base.padding, base.stride = padding, stride
    else:
        result = layer(torch.eye(base.in_features))
    return (result - (0 if base.bias is None else base.bias)).T.reshape(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_comfyuis_arithmetic_gives_the_live_weights(kind: str, tmp_path: Path) -> None:
    model, path = trained(kind), tmp_path / "style.safetensors"
    model.unet.eval()
    report = export_lora(model, SDXL, path, precision="fp32")
    assert report.relative_difference is not None
    assert report.relative_difference < 1e-4
    stored = read_modules(read_lora(path))
    layers = adapted_layers(model, "default")
    assert len(stored) == len(layers) > 20
    for name, layer in layers.items():
        module, weight = stored[SDXL.kohya_prefix(name)], layer.get_base_layer().weight
        change = comfyui_change(module.weights, module.alpha, weight)
        live = effective(layer, weight) - weight
        assert (change - live).norm() < 1e-4 * live.norm(), name
        assert live.norm() > 1e-3 * weight.norm(), name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_put_on_a_fresh_model_gives_the_trained_one(kind: str, precision: Any, tmp_path: Path) -> None:
    model, path = trained(kind), tmp_path / "style.safetensors"
    report = export_lora(model, SDXL, path, precision=precision)
    assert report.relative_difference is not None
    assert 0 < report.relative_difference < (0.005 if precision == "fp16" else 0.04)
    other = fresh()
    base, live = predict(other), predict(model)
    file = load_lora(other, SDXL, path, "compare")
    assert file.kind == kind.partition(",")[0].replace("rslora", "lora")
    assert (predict(other) - live).norm() < (0.005 if precision == "fp16" else 0.04) * (live - base).norm()
    assert not [n for n, p in other.unet.named_parameters() if p.requires_grad]


def test_dora_in_the_diffusers_layout_loads_in_a_fresh_pipeline(tmp_path: Path) -> None:
    model, path = trained("dora"), tmp_path / "style.safetensors"
    export_lora(model, SDXL, path, layout="diffusers", precision="fp32")
    other = fresh()
    SDXL.pipeline(other).load_lora_weights(str(path))
    assert torch.allclose(predict(other), predict(model), atol=1e-5)
    assert not torch.allclose(predict(other), predict(fresh()), atol=1e-2)


NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
DAMAGES = [
    ("dora", "dora_scale", lambda t: t * 1.01, r"dora_scale weights of .*attn1_to_q"),
    ("loha", "hada_w2_a", lambda t: t * 1.01, r"hada_w2_a weights of .*attn1_to_q"),
    ("loha", "hada_w1_b", None, r"lacks .*attn1_to_q\.hada_w1_b"),
    ("lokr", "alpha", lambda t: t * 2, r"weights of .*attn1_to_q"),
]


@pytest.mark.parametrize(("kind", "tensor", "change", "message"), DAMAGES)
def test_damage_is_named(kind: str, tensor: str, change: Any, message: str, tmp_path: Path) -> None:
    model, path = trained(kind), tmp_path / "style.safetensors"
    export_lora(model, SDXL, path, verify=False)
    tensors, metadata = load_file(path), read_lora(path).metadata
    value = tensors.pop(f"{NAME}.{tensor}")
    save_file(tensors if change is None else {**tensors, f"{NAME}.{tensor}": change(value)}, path, metadata)
    with pytest.raises(ExportError, match=message):
        verify_lora(model, SDXL, path)


def test_an_arithmetic_that_comfyui_does_not_share_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lengths, as peft keeps them, are another change in ComfyUI."""
    from mapo_core import lora_check, lora_file

    model = trained("dora")

    def plain(module: Any, back: bool = False) -> Any:
        lengths = module.weights["dora_scale"].flatten()
        shaped = lengths if back else lengths.reshape(-1, *[1] * (module.base().ndim - 1))
        return replace(module, weights={**module.weights, "dora_scale": shaped})

    monkeypatch.setattr(lora_file, "with_comfyui_lengths", plain)
    monkeypatch.setattr(lora_check, "with_comfyui_lengths", plain)
    with pytest.raises(ExportError, match=r"ComfyUI would change .* otherwise than the trained adapter"):
        export_lora(model, SDXL, tmp_path / "style.safetensors")
