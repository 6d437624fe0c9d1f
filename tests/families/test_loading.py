from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from mapo_core.errors import ModelError
from mapo_core.families import FAMILIES
from tests.families import checkpoints

if TYPE_CHECKING:
    from tests.families.conftest import Tiny


def assert_same_weights(tiny: Tiny, model, dtype: torch.dtype = torch.float32) -> None:
    loaded = {"unet": model.unet, "vae": model.vae}
    loaded |= dict(zip([n for n in tiny.modules() if n.startswith("text")], model.text_encoders, strict=True))
    for name, module in tiny.modules().items():
        wanted = torch.float32 if name == "vae" else dtype
        state = loaded[name].state_dict()
        assert state.keys() == module.state_dict().keys()
        for key, tensor in module.state_dict().items():
            assert state[key].dtype == wanted
            assert torch.equal(state[key], tensor.to(wanted)), f"{name} {key}"


def edited(tiny: Tiny, target: Path, **changes: torch.Tensor | None) -> Path:
    tensors = load_file(tiny.file) | {k: v for k, v in changes.items() if v is not None}
    save_file({k: v for k, v in tensors.items() if k not in changes or changes[k] is not None}, target)
    return target


@pytest.mark.parametrize("form", ["folder", "file"])
def test_every_weight_arrives(tiny: Tiny, form: str) -> None:
    model = tiny.load(getattr(tiny, form))
    assert_same_weights(tiny, model)
    for module in (model.unet, model.vae, *model.text_encoders):
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    assert (model.family, model.resolution, model.latent_scale) == (tiny.name, 64, 8)


def test_both_forms_compute_the_same_as_diffusers(tiny: Tiny) -> None:
    """Catches buffers and configs, which are not in the weights."""
    prompt, x = "a photo of a cat", torch.randn(1, 3, 64, 64)
    for form in (tiny.folder, tiny.file):
        model = tiny.load(form)
        with torch.no_grad():
            assert torch.equal(model.vae.encode(x).latent_dist.mean, tiny.pipe.vae.encode(x).latent_dist.mean)
        embeds = tiny.family.encode_prompts(model, [prompt])[0]["prompt_embeds"]
        with torch.no_grad():
            theirs = tiny.pipe.encode_prompt(
                prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )[0]
        assert torch.allclose(embeds, theirs[0], atol=1e-6)


def test_half_precision_keeps_the_vae_in_float32(tiny: Tiny) -> None:
    model = tiny.load(tiny.file, dtype=torch.bfloat16)
    assert_same_weights(tiny, model, torch.bfloat16)


def test_fp16_file_with_ema_and_flags(tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {k: v.half() for k, v in load_file(tiny.file).items()}
    tensors |= {"model_ema." + k.replace(".", ""): v for k, v in load_file(tiny.file).items() if "diffusion" in k}
    text = "conditioner.embedders.0." if tiny.name == "sdxl" else "cond_stage_model."
    tensors |= {"alphas_cumprod": torch.ones(1000), "v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    tensors |= {
        text + "logit_scale": torch.ones(()),
        text + "transformer.text_model.embeddings.position_ids": torch.arange(77),
    }
    tensors |= {"first_stage_model.loss.logvar": torch.ones(()), "mystery.weight": torch.ones(1)}
    path = checkpoints.write_single_file(tmp_path / "m.safetensors", tensors)
    with caplog.at_level(logging.WARNING, "mapo_core"):
        model = tiny.load(path)
    assert [r.getMessage() for r in caplog.records if r.name.startswith("mapo_core")] == [
        f"{path}: 1 tensors are not used, for example mystery.weight"
    ]
    weight = tiny.pipe.unet.conv_in.weight
    assert torch.equal(model.unet.conv_in.weight, weight.half().float())
    assert model.prediction_type == "v_prediction"
    assert model.noise_scheduler.alphas_cumprod[-1] == 0
    assert model.sampling_scheduler.config.timestep_spacing == "trailing"


def test_older_names_of_the_text_encoder_and_the_vae(tiny: Tiny, tmp_path: Path) -> None:
    tensors = {k.replace("transformer.text_model.", "transformer."): v for k, v in load_file(tiny.file).items()}
    assert_same_weights(tiny, tiny.load(checkpoints.write_single_file(tmp_path / "m.safetensors", tensors)))

    folder = checkpoints.copy_folder(tiny.folder, tmp_path / "folder")
    vae = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(vae)
    for new, before in old.items():
        tensors = {k.replace(f".{new}.", f".{before}."): v for k, v in tensors.items()}
    save_file(tensors, vae)
    text = folder / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(text).items()}, text)
    assert_same_weights(tiny, tiny.load(folder))


def test_missing_spare_and_misshapen_tensors_are_errors(tiny: Tiny, tmp_path: Path) -> None:
    key = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    with pytest.raises(ModelError, match=rf"the unet of .* lacks 1 of \d+ tensors, for example {key}"):
        tiny.load(edited(tiny, tmp_path / "missing.safetensors", **{key: None}))
    path = edited(tiny, tmp_path / "extra.safetensors", **{"model.diffusion_model.adapter.weight": torch.ones(1)})
    with pytest.raises(ModelError, match=r"has 1 tensors that it should not have, for example .*adapter\.weight"):
        tiny.load(path)
    with pytest.raises(ModelError, match=r"down_blocks.0.resnets.0.conv1.weight has the shape \[3, 3\]"):
        tiny.load(edited(tiny, tmp_path / "shape.safetensors", **{key: torch.ones(3, 3)}))
    # Of as many elements, but no 1x1 convolution.
    rows, columns, *_ = load_file(tiny.file)[key].shape
    path = edited(tiny, tmp_path / "shape2.safetensors", **{key: torch.ones(rows * 3, columns, 3)})
    with pytest.raises(ModelError, match=r"has the shape"):
        tiny.load(path)


def test_a_file_without_vae_asks_for_one_and_takes_it(tiny: Tiny, tmp_path: Path) -> None:
    tensors = load_file(tiny.file)
    without = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}
    path = checkpoints.write_single_file(tmp_path / "m.safetensors", without)
    with pytest.raises(ModelError, match=r"has no VAE. Give one as model.vae"):
        tiny.load(path)
    assert_same_weights(tiny, tiny.load(path, vae=str(tiny.folder)))
    assert_same_weights(tiny, tiny.load(path, vae=str(tiny.folder / "vae")))
    assert_same_weights(tiny, tiny.load(path, vae=str(tiny.file)))
    alone = {k.removeprefix("first_stage_model."): v for k, v in tensors.items() if k.startswith("first_stage_model.")}
    vae = checkpoints.write_single_file(tmp_path / "vae.safetensors", alone)
    assert_same_weights(tiny, tiny.load(path, vae=str(vae)))
    plain = tiny.folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert_same_weights(tiny, tiny.load(path, vae=str(plain)))
    with pytest.raises(ModelError, match=r"holds no VAE"):
        tiny.load(path, vae=str(tiny.folder / "unet" / "diffusion_pytorch_model.safetensors"))
    with pytest.raises(ModelError, match=r"is not a VAE .*UNet2DConditionModel"):
        tiny.load(path, vae=str(tiny.folder / "unet"))


def test_fingerprint_is_that_of_vae_and_text_encoders(tiny: Tiny, tmp_path: Path) -> None:
    whole = tiny.load(tiny.file)
    assert tiny.load(tiny.file, encoders=False).fingerprint == whole.fingerprint
    copy = edited(tiny, tmp_path / "copy.safetensors")
    assert tiny.load(copy).fingerprint == whole.fingerprint
    tensors = load_file(tiny.file)
    unet = "model.diffusion_model.out.2.bias"
    changed = edited(tiny, tmp_path / "unet.safetensors", **{unet: tensors[unet] + 1})
    assert tiny.load(changed).fingerprint == whole.fingerprint
    for key in ("first_stage_model.decoder.conv_out.bias", next(k for k in tensors if k.startswith("cond"))):
        changed = edited(tiny, tmp_path / "encoder.safetensors", **{key: tensors[key] + 1})
        assert tiny.load(changed).fingerprint != whole.fingerprint
    assert (
        tiny.load(tiny.folder).fingerprint
        == tiny.load(checkpoints.copy_folder(tiny.folder, tmp_path / "f")).fingerprint
    )


def test_without_encoders(tiny: Tiny) -> None:
    model = tiny.load(encoders=False)
    assert model.vae is None
    assert model.text_encoders == []
    assert model.latent_scale == 8
    assert len(model.tokenizers) == len(tiny.family._blueprint.text)  # pyright: ignore


def test_prediction_type_by_hand_wins_over_the_folder(tiny: Tiny, tmp_path: Path) -> None:
    assert tiny.load().prediction_type == "epsilon"
    folder = checkpoints.copy_folder(tiny.folder, tmp_path / "folder")
    settings = folder / "scheduler" / "scheduler_config.json"
    values = json.loads(settings.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    values["beta_end"] = 0.02
    settings.write_text(json.dumps(values))
    model = tiny.load(folder)
    assert model.prediction_type == model.noise_scheduler.config.prediction_type == "v_prediction"
    assert model.sampling_scheduler.config.prediction_type == "v_prediction"
    assert model.noise_scheduler.config.beta_end == 0.02
    assert model.noise_scheduler.alphas_cumprod[-1] == 0
    model = tiny.load(folder, prediction_type="epsilon", zero_terminal_snr=False)
    assert model.prediction_type == model.noise_scheduler.config.prediction_type == "epsilon"
    assert model.noise_scheduler.alphas_cumprod[-1] > 0
    assert model.sampling_scheduler.config.timestep_spacing == "leading"
    settings.write_text(json.dumps(values | {"prediction_type": "sample"}))
    with pytest.raises(ModelError, match='predicts "sample"'):
        tiny.load(folder)


def test_published_noise_schedule(tiny: Tiny) -> None:
    model = tiny.load(tiny.file)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    assert torch.allclose(model.noise_scheduler.alphas_cumprod, (1 - betas).cumprod(0), rtol=1e-5)


def test_the_folders_own_sampler_is_kept_where_it_can_be(tiny: Tiny, tmp_path: Path) -> None:
    folder = checkpoints.copy_folder(tiny.folder, tmp_path / "folder")
    settings = folder / "scheduler" / "scheduler_config.json"
    values = {**checkpoints.NOISE, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
    settings.write_text(json.dumps(values))
    model = tiny.load(folder)
    assert type(model.sampling_scheduler).__name__ == "PNDMScheduler"
    assert model.sampling_scheduler.config.skip_prk_steps
    zero = tiny.load(folder, zero_terminal_snr=True, prediction_type="v_prediction")
    assert type(zero.sampling_scheduler).__name__ == "EulerDiscreteScheduler"
    assert zero.sampling_scheduler.config.rescale_betas_zero_snr


def test_variants_and_shards(tiny: Tiny, tmp_path: Path) -> None:
    folder = checkpoints.copy_folder(tiny.folder, tmp_path / "folder")
    for file in folder.glob("*/*model.safetensors"):
        file.rename(file.with_name(file.name.replace("model.safe", "model.fp16.safe")))
    with pytest.raises(ModelError, match=r"set model.variant, for example to fp16"):
        tiny.load(folder)
    assert_same_weights(tiny, tiny.load(folder, variant="fp16"))
    with pytest.raises(ModelError, match=r'no weights of variant "bf16"'):
        tiny.load(folder, variant="bf16")
    whole = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    for i in (0, 1):
        part = {k: v for n, (k, v) in enumerate(tensors.items()) if n % 2 == i}
        save_file(part, whole.with_name(f"diffusion_pytorch_model.fp16-0000{i + 1}-of-00002.safetensors"))
    assert_same_weights(tiny, tiny.load(folder, variant="fp16"))


def test_pickled_weights_are_not_read(tiny: Tiny, tmp_path: Path) -> None:
    folder = checkpoints.copy_folder(tiny.folder, tmp_path / "folder")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"only pickled weights"):
        tiny.load(folder)


def test_a_tokenizer_without_words_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    folder = checkpoints.copy_folder(tiny.folder, tmp_path / "folder")
    for file in (folder / "tokenizer").glob("*"):
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ModelError, match=r"tokenizer"):
        tiny.load(folder)


def test_clip_skip_beyond_the_layers(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match=r"clip_skip is 3, but text_encoder has 4 layers"):
        tiny.load(clip_skip=3)


def test_wrong_family(tiny: Tiny) -> None:
    other = FAMILIES["sd15" if tiny.name == "sdxl" else "sdxl"]
    from mapo_core.config import ModelConfig

    for form in (tiny.folder, tiny.file):
        with pytest.raises(ModelError, match=rf"is Stable Diffusion .*, not {other.title}"):
            other.load(ModelConfig(path=str(form)))
