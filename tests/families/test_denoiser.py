from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from mapo_core.families import FAMILIES, ImageGeometry

if TYPE_CHECKING:
    from tests.families.conftest import Tiny

SQUARE = ImageGeometry((64, 64), (0, 0), (64, 64))


def test_prediction_equals_the_unet(tiny: Tiny) -> None:
    model = tiny.load()
    prompts = tiny.family.encode_prompts(model, ["a cat", "a dog"])
    geometry = [ImageGeometry((1025, 700), (3, 4), (64, 72)), SQUARE]
    conditions = tiny.family.batch_conditions(prompts, geometry)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    embeds = torch.stack([p["prompt_embeds"] for p in prompts])
    added = {}
    if tiny.name == "sdxl":
        ids = torch.tensor([[1025.0, 700, 3, 4, 64, 72], [64, 64, 0, 0, 64, 64]])
        assert torch.equal(conditions["add_time_ids"], ids)
        added = {"text_embeds": torch.stack([p["pooled_prompt_embeds"] for p in prompts]), "time_ids": ids}
    else:
        assert conditions.keys() == {"prompt_embeds"}
    with torch.no_grad():
        ours = tiny.family.predict(model, x, t, conditions)
        theirs = tiny.pipe.unet(x, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample
    assert torch.equal(ours, theirs)


def test_repeated_prompts_predict_the_same(tiny: Tiny) -> None:
    model = tiny.load()
    short, long = tiny.family.encode_prompts(model, ["a cat", "a red boat " * 40])
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([500, 500])
    with torch.no_grad():
        both = tiny.family.predict(model, x, t, tiny.family.batch_conditions([short, long], [SQUARE, SQUARE]))
        for i, one in enumerate((short, long)):
            alone = tiny.family.predict(model, x[i : i + 1], t[:1], tiny.family.batch_conditions([one], [SQUARE]))
            assert torch.allclose(both[i], alone[0], atol=1e-5)


def test_sizes_are_exact_in_bfloat16(tiny: Tiny) -> None:
    """1025 is not a bfloat16; the UNet must still see it."""
    if tiny.name != "sdxl":
        pytest.skip("SD 1.5 is not told sizes")
    model = tiny.load(dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    model.unet.add_time_proj.register_forward_hook(lambda _m, inputs, output: seen.extend([inputs[0], output]))
    prompts = tiny.family.encode_prompts(model, ["a cat"])
    conditions = tiny.family.batch_conditions(prompts, [ImageGeometry((1025, 1027), (1, 3), (1025, 1023))])
    with torch.no_grad():
        output = tiny.family.predict(model, torch.randn(1, 4, 8, 8), torch.tensor([10]), conditions)
    assert output.dtype == torch.float32
    assert torch.equal(seen[0], torch.tensor([1025.0, 1027, 1, 3, 1025, 1023]))
    assert seen[1].dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(seen[1], tiny.pipe.unet.add_time_proj(seen[0]))


def test_images_to_scaled_latents_and_back(tiny: Tiny) -> None:
    model = tiny.load(dtype=torch.bfloat16)
    x = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):  # the VAE's float32 does not depend on the caller
        mean, std = tiny.family.encode_images(model, x)
    assert mean.shape == std.shape == (2, 4, 8, 6)
    assert mean.dtype == std.dtype == torch.float32
    vae = tiny.pipe.vae
    with torch.no_grad():
        posterior = vae.encode(x).latent_dist
    scale = {"sdxl": 0.13025, "sd15": 0.18215}[tiny.name]
    assert torch.equal(mean, posterior.mean * scale)
    assert torch.equal(std, posterior.std * scale)
    with torch.no_grad():
        again = model.vae.decode(mean / scale).sample
        assert torch.allclose(again, vae.decode(posterior.mean).sample, atol=1e-5)
    assert again.shape == x.shape
    model.vae.register_to_config(shift_factor=0.5)
    shifted, _ = tiny.family.encode_images(model, x)
    assert torch.allclose(shifted, (posterior.mean - 0.5) * scale, atol=1e-6)


def test_pipeline_draws_the_same_as_diffusers(tiny: Tiny) -> None:
    model = tiny.load()
    prompts = tiny.family.encode_prompts(model, ["a cat", "ugly"])
    arguments = {name: value[None] for name, value in prompts[0].items()}
    arguments |= {f"negative_{name}": value[None] for name, value in prompts[1].items()}
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "height": 64, "width": 48, "output_type": "pt"}
    pipe = tiny.family.pipeline(model)
    assert pipe.unet is model.unet
    assert pipe.vae is model.vae
    pipe.set_progress_bar_config(disable=True)
    tiny.pipe.set_progress_bar_config(disable=True)
    pictures = pipe(**arguments, **settings, generator=torch.Generator().manual_seed(1)).images
    theirs = tiny.pipe("a cat", negative_prompt="ugly", **settings, generator=torch.Generator().manual_seed(1)).images
    assert torch.allclose(pictures, theirs, atol=1e-4)

    model.text_encoders = []
    pipe = tiny.family.pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    again = pipe(**arguments, **settings, generator=torch.Generator().manual_seed(1)).images
    assert torch.equal(again, pictures)

    model.release_encoders()
    pipe = tiny.family.pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    settings["output_type"] = "latent"
    latents = pipe(**arguments, **settings, generator=torch.Generator().manual_seed(1)).images
    assert latents.shape == (1, 4, 8, 6)
    assert torch.isfinite(latents).all()


def test_pipelines_do_not_share_a_scheduler(tiny: Tiny) -> None:
    model = tiny.load()
    first, second = tiny.family.pipeline(model), tiny.family.pipeline(model)
    assert first.scheduler is not second.scheduler
    assert first.scheduler.config == model.sampling_scheduler.config


def test_without_a_vae_the_scale_is_the_models(tiny: Tiny) -> None:
    model = dataclasses.replace(tiny.load(encoders=False), latent_scale=4)
    assert tiny.family.pipeline(model).vae_scale_factor == 4


def test_predicting_with_a_lora_in_float32(tiny: Tiny) -> None:
    """The family must find the UNet's precision, not the adapter's."""
    from peft import LoraConfig

    model = tiny.load(dtype=torch.bfloat16)
    targets = FAMILIES[tiny.name].target_modules(("attention", "feed_forward", "conv"))
    model.unet.add_adapter(LoraConfig(r=2, target_modules=targets))
    for parameter in model.unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    seen: list[torch.dtype] = []
    model.unet.conv_in.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].dtype))
    prompts = tiny.family.encode_prompts(model, ["a cat"])
    conditions = tiny.family.batch_conditions(prompts, [SQUARE])
    output = tiny.family.predict(model, torch.randn(1, 4, 8, 8), torch.tensor([10]), conditions)
    assert seen == [torch.bfloat16]
    output.square().mean().backward()
    trained = [p for p in model.unet.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained)
