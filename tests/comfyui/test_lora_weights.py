"""ComfyUI's own code on our files: every kind of adapter changes every weight as the trained adapter does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_core.comfy_weights import comfyui_change
from mapo_core.export import export_lora, read_lora
from mapo_core.lora_adapter import adapted_layers, layer_parameters
from mapo_core.lora_check import live_change
from mapo_core.lora_file import read_modules
from tests.test_export_kinds import KINDS, SDXL, trained

pytestmark = pytest.mark.comfyui


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
def test_comfyui_changes_the_weights_as_the_adapter_does(
    kind: str, precision: str, installation: tuple[Path, str], tmp_path: Path
) -> None:
    folder, python = installation
    model, lora = trained(kind), tmp_path / "style.safetensors"
    export_lora(model, SDXL, lora, precision=precision)  # type: ignore[arg-type]
    layers = adapted_layers(model, "default")
    base = {SDXL.kohya_prefix(n): layer.get_base_layer().weight.detach().clone() for n, layer in layers.items()}
    save_file(base, tmp_path / "base.safetensors")
    script = Path(__file__).with_name("lora_weights.py")
    arguments = [str(lora), str(tmp_path / "base.safetensors"), str(tmp_path / "changes.safetensors")]
    done = subprocess.run(
        [python, str(script), str(folder), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lora key not loaded" not in done.stderr + done.stdout
    changes, stored = load_file(tmp_path / "changes.safetensors"), read_modules(read_lora(lora))
    assert changes.keys() == stored.keys()
    tolerance = 1e-4 if precision == "fp32" else 5e-3
    for name, layer in layers.items():
        key = SDXL.kohya_prefix(name)
        with torch.no_grad():
            own = {n: p.detach() for n, p in layer_parameters(layer, "default").items()}
            live = live_change(layer, "default", base[key], own)
        assert (changes[key] - live).norm() < tolerance * live.norm(), name
        ours = comfyui_change(stored[key].weights, stored[key].alpha, base[key])
        assert torch.allclose(changes[key], ours, rtol=1e-4, atol=1e-6), name
