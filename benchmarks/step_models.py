"""Random-weight models with SDXL's architecture, of three sizes, and pairs of noise to train them on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mapo_core.families._blueprint import ASSETS, CLIP_VOCABULARY

SDXL = ASSETS / "sdxl"


@dataclass(frozen=True)
class Size:
    """A model and the pictures that it is timed with.

    Attributes:
        resolution: side of the square pictures, pixels.
        unet, vae, text, text_2: what differs from SDXL's own configs.
    """

    resolution: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    text_2: dict[str, Any]


def _text(width: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": width,
    }


# "reduced" is SDXL with a quarter of every width at a quarter of the side: every part costs 1/256, so that VAE, text
# encoders and UNet stand to each other as in SDXL at 1024 pixels (docs/benchmarks/train_step.md has the numbers).
# The text encoders see 77 tokens at any resolution, so they lose layers instead.
SIZES = {
    "full": Size(1024, {}, {}, {}, {}),
    "reduced": Size(
        256,
        {
            "block_out_channels": [80, 160, 320],
            "norm_num_groups": 16,
            "cross_attention_dim": 512,
            "addition_time_embed_dim": 64,
            "projection_class_embeddings_input_dim": 6 * 64 + 320,
            "sample_size": 32,
        },
        {"block_out_channels": [32, 64, 144, 144], "norm_num_groups": 16, "sample_size": 256},
        _text(192, 2, 3),
        _text(320, 2, 5),
    ),
    "tiny": Size(
        64,
        {
            "block_out_channels": [16, 32],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 1],
            "attention_head_dim": [2, 4],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 16,
            "sample_size": 16,
        },
        {
            "block_out_channels": [8, 16, 16],
            "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3,
            "norm_num_groups": 4,
            "sample_size": 64,
        },
        _text(16, 2, 2),
        _text(16, 2, 2),
    ),
}


def part_config(size: str, part: str) -> dict[str, Any]:
    """The config of "unet", "vae", "text_encoder" or "text_encoder_2"."""
    changes = {"unet": "unet", "vae": "vae", "text_encoder": "text", "text_encoder_2": "text_2"}[part]
    config = json.loads((SDXL / part / "config.json").read_text(encoding="utf-8"))
    return {**config, **getattr(SIZES[size], changes)}


def build_part(size: str, part: str) -> Any:
    """A component with random weights, on torch's default device and in its default precision."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = part_config(size, part)
    if part == "unet":
        return UNet2DConditionModel.from_config(config)
    if part == "vae":
        return AutoencoderKL.from_config(config)
    text = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    return text(CLIPTextConfig(**config))


def write_model(folder: Path, size: str) -> Path:
    """A diffusers folder of the model, written once; the full one in bfloat16 (7 GB), the others in float32."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(CLIP_VOCABULARY, model_max_length=77)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if size == "full" else torch.float32)
    try:
        parts = {name: build_part(size, name) for name in ("unet", "vae", "text_encoder", "text_encoder_2")}
    finally:
        torch.set_default_dtype(before)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def write_pairs(folder: Path, resolution: int, count: int) -> str:
    """Pictures of noise; the text of their pairs.jsonl. What is in them changes nothing about the time."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    lines: list[str] = []
    for i in range(count):
        record = {"prompt": f"picture number {i}, drawn with a fine pen on rough paper"}
        for side in ("chosen", "rejected"):
            path = folder / f"{side}-{resolution}-{i}.png"
            if not path.exists():
                pixels = generator.integers(0, 256, (resolution, resolution, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path, compress_level=1)
            record[side] = str(path)
        lines.append(json.dumps(record))
    return "\n".join(lines) + "\n"
