"""Random-weight models for tests: tiny ones with the real classes, and full-size single files."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from mapo_core.families import FAMILIES, Family
from mapo_core.families._blueprint import BLUEPRINTS, CLIP_VOCABULARY, UNET_PREFIX, VAE_PREFIX, TextPart
from mapo_core.families._keys import clip_ldm_names, open_clip_names, unet_ldm_names, vae_ldm_names
from mapo_core.families.detect import read_json

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def tiny_pipeline(family: str, seed: int = 0) -> Any:
    """The published block types at a fraction of their width; the full CLIP vocabulary."""
    torch.manual_seed(seed)
    parts: dict[str, Any] = {
        "vae": AutoencoderKL(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            norm_num_groups=4,
            sample_size=64,
            scaling_factor=0.13025 if family == "sdxl" else 0.18215,
        ),
        "scheduler": EulerDiscreteScheduler(**NOISE, timestep_spacing="leading", steps_offset=1),
    }
    unet: dict[str, Any] = {"sample_size": 8, "layers_per_block": 2, "norm_num_groups": 8}
    if family == "sdxl":
        unet |= {
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 1, 2),
            "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 40,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 8 * 6 + 24,
        }
    else:
        unet |= {
            "block_out_channels": (16, 32, 32, 32),
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
            "attention_head_dim": 4,
            "cross_attention_dim": 16,
        }
    parts["unet"] = UNet2DConditionModel(**unet)
    for text in BLUEPRINTS[family].text:
        config = transformers.CLIPTextConfig(
            hidden_size=16 if text.layout == "clip" else 24,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=49408,
            max_position_embeddings=77,
            projection_dim=24,
            hidden_act="quick_gelu" if text.layout == "clip" else "gelu",
        )
        parts[text.name] = getattr(transformers, text.class_name)(config)
        extra = {"pad_token": text.pad_token} if text.pad_token else {}
        parts[text.tokenizer] = transformers.CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, **extra)
    for part in parts.values():
        if isinstance(part, nn.Module):
            _spread(part)
    if family == "sdxl":
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=False, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


@torch.no_grad()
def _spread(module: nn.Module) -> None:
    """Make every parameter its own, so that two that are exchanged do not go unnoticed."""
    module.eval()
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter) * 0.05
        parameter.copy_(1 + noise if "norm" in name and name.endswith("weight") else parameter + noise)


def ldm_tensors(family: str, modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A single file's tensors from UNet, VAE and text encoders."""
    found: dict[str, Tensor] = {}
    unet, vae = modules["unet"], modules["vae"]
    found |= _renamed(unet, UNET_PREFIX, unet_ldm_names(unet.config.layers_per_block))  # pyright: ignore
    vae_tensors = _renamed(vae, VAE_PREFIX, vae_ldm_names(len(vae.config.block_out_channels)))  # pyright: ignore
    for name, tensor in vae_tensors.items():
        attention = ".attn_1." in name and tensor.ndim == 2
        found[name] = tensor[:, :, None, None] if attention else tensor  # published files have 1x1 convolutions
    for text in BLUEPRINTS[family].text:
        naming = open_clip_names if text.layout == "open_clip" else clip_ldm_names
        found |= _renamed(modules[text.name], text.prefix, naming)
    return found


def _renamed(module: nn.Module, prefix: str, naming: Any) -> dict[str, Tensor]:
    state = module.state_dict()
    found: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor | None]] = {}
    for name, piece in naming(state, set()).items():
        key = prefix + piece.key
        if piece.third is None:
            found[key] = state[name].T if piece.transposed else state[name]
        else:
            thirds.setdefault(key, [None] * 3)[piece.third] = state[name]
    return found | {key: torch.cat(list(parts)) for key, parts in thirds.items()}  # pyright: ignore


def pipeline_modules(family: str, pipe: Any) -> dict[str, nn.Module]:
    """UNet, VAE and text encoders of a diffusers pipeline, by name."""
    names = ("unet", "vae", *(t.name for t in BLUEPRINTS[family].text))
    return {name: getattr(pipe, name) for name in names}


def write_single_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, path, metadata)
    return path


def family_for(name: str, configs: Path) -> Family:
    """The family, whose single files have the architecture of another diffusers folder instead of the published one."""
    return type(FAMILIES[name])(dataclasses.replace(BLUEPRINTS[name], configs=configs))  # pyright: ignore


def empty_modules(family: str) -> dict[str, nn.Module]:
    """Full-size modules without memory for their parameters."""
    configs = BLUEPRINTS[family].configs
    with init_empty_weights():
        modules: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(read_json(configs / "unet" / "config.json")),
            "vae": AutoencoderKL.from_config(read_json(configs / "vae" / "config.json")),
        }
        for text in BLUEPRINTS[family].text:
            modules[text.name] = empty_text_encoder(configs, text)
    return modules


def empty_text_encoder(configs: Path, text: TextPart) -> nn.Module:
    config = transformers.CLIPTextConfig.from_dict(read_json(configs / text.name / "config.json"))
    return getattr(transformers, text.class_name)(config)


def write_random_checkpoint(
    family: str, path: Path, dtype: torch.dtype = torch.float16, extra: dict[str, Tensor] | None = None
) -> Path:
    """A full-size single file with random weights: 2.1 GB for SD 1.5 in fp16, 6.9 GB for SDXL (as much RAM).

    Weights are small enough for finite outputs; one block of noise is used again and again, which is cheap.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 22, generator=generator).mul_(0.02).to(dtype)
    tensors: dict[str, Tensor] = {}
    for name, like in ldm_tensors(family, empty_modules(family)).items():
        if like.ndim == 1 and name.endswith("weight"):
            tensors[name] = torch.ones(like.shape, dtype=dtype)  # of a norm
        else:
            start = len(tensors) * 7919 % (1 << 21)
            count = like.numel()
            repeated = noise[start:].repeat(-(-count // (len(noise) - start)))[:count]
            tensors[name] = repeated.reshape(like.shape).contiguous()
    save_file(tensors | (extra or {}), path)
    return path


def write_folder(family: str, pipe: Any, folder: Path) -> Path:
    """As diffusers saves it, but with the tokenizers as vocab.json and merges.txt, which load 20 times as fast."""
    pipe.save_pretrained(folder)
    for text in BLUEPRINTS[family].text:
        target = folder / text.tokenizer
        (target / "tokenizer.json").unlink()
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(CLIP_VOCABULARY / name, target)
        config = read_json(target / "tokenizer_config.json")
        assert config["model_max_length"] == 77
        assert config["pad_token"] == (text.pad_token or "<|endoftext|>")
    return folder


def copy_folder(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target
