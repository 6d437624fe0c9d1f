"""The published sizes, with random weights, through the public path. SDXL needs 7 GB of disk and 17 GB of memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn

from mapo_core.config import ModelConfig
from mapo_core.families import FAMILIES, ImageGeometry, detect
from tests.families.checkpoints import write_random_checkpoint


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_single_file_trains_two_steps(name: str, tmp_path: Path) -> None:
    if name == "sdxl" and not os.environ.get("MAPO_TEST_SDXL"):
        pytest.skip("set MAPO_TEST_SDXL=1 to write and load a full-size SDXL file")
    dtype = torch.float32 if name == "sd15" else torch.bfloat16
    extra = {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])} if name == "sdxl" else {}
    path = write_random_checkpoint(name, tmp_path / "full.safetensors", extra=extra)
    found = detect(path)
    assert (found.family, found.kind) == (name, "single_file")
    family = FAMILIES[name]
    model = family.load(ModelConfig(path=str(path)), dtype=dtype)
    path.unlink()  # gigabytes that pytest would keep for three runs
    assert (model.resolution, model.latent_scale) == (family.resolution, 8)
    assert model.prediction_type == ("v_prediction" if name == "sdxl" else "epsilon")
    prompts = family.encode_prompts(model, ["a photo of a cat", "a red boat " * 40])
    assert prompts[0]["prompt_embeds"].shape == (77, 768 if name == "sd15" else 2048)
    assert prompts[1]["prompt_embeds"].shape[0] == 154
    mean, std = family.encode_images(model, torch.rand(2, 3, 64, 64) * 2 - 1)
    assert torch.isfinite(mean).all()
    model.release_encoders()

    model.unet.add_adapter(LoraConfig(r=2, target_modules=family.target_modules(("attention",))))  # pyright: ignore
    trained = [p for p in model.unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    up = [p for n, p in model.unet.named_parameters() if "lora_B" in n]
    base = model.unet.get_parameter("conv_in.weight").clone()
    model.unet.enable_gradient_checkpointing()  # pyright: ignore
    model.unet.train()
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    conditions = family.batch_conditions(prompts, [ImageGeometry((64, 64), (0, 0), (64, 64))] * 2)
    noise, timesteps = torch.randn_like(mean), torch.tensor([100, 800])
    noisy = model.noise_scheduler.add_noise(mean + std * torch.randn_like(std), noise, timesteps)
    for _ in range(2):
        loss = nn.functional.mse_loss(family.predict(model, noisy, timesteps, conditions), noise)
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool(p.any()) for p in up)
    assert torch.equal(model.unet.get_parameter("conv_in.weight"), base)
