"""Every key of a full-size LoRA against ComfyUI's naming rules; the rules are stated here a second time, the other way.

mapo_core.lora_keys goes through the diffusers blocks and says where each lands. Here the original (LDM) UNet is built
layer by layer as its constructor does it, and every layer is given its diffusers name. Both must agree with each other
and with the layers of a real UNet2DConditionModel of the published size.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

from mapo_core.errors import ExportError
from mapo_core.families import FAMILIES
from mapo_core.lora_adapter import adapted_layers
from mapo_core.lora_keys import (
    KOHYA_SUFFIXES,
    PUBLISHED_LAYOUTS,
    block_layout,
    check_against_naming_rules,
    comfyui_names,
    kohya_name,
)

# The published configurations: unet/config.json of stable-diffusion-xl-base-1.0 and stable-diffusion-v1-5.
PUBLISHED: dict[str, dict[str, Any]] = {
    "sdxl": json.loads(
        """{"sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048,
        "use_linear_projection": true, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816}"""
    ),
    "sd15": json.loads(
        """{"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 8, "cross_attention_dim": 768}"""
    ),
}
# The original configurations, sd_xl_base.yaml and v1-inference.yaml: channel_mult, attention_resolutions and
# transformer_depth, and whether there is a label embedding.
ORIGINAL: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool]] = {
    "sdxl": ((1, 2, 4), (4, 2), (1, 2, 10), True),
    "sd15": ((1, 2, 4, 4), (4, 2, 1), (1, 1, 1, 1), False),
}
GROUPS = ("attention", "feed_forward", "conv")


class OriginalUNet:
    """The layers of ldm's openaimodel.UNetModel in the order of its constructor, each with its diffusers name."""

    def __init__(self, mult: tuple[int, ...], attention: tuple[int, ...], depth: tuple[int, ...], label: bool) -> None:
        self.names: dict[str, str] = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
        for i in (0, 1):
            self.names[f"time_embedding.linear_{i + 1}"] = f"time_embed.{2 * i}"
            if label:
                self.names[f"add_embedding.linear_{i + 1}"] = f"label_emb.0.{2 * i}"
        channels, skipped, input_block, scale = 1, [1], 1, 1
        for level, factor in enumerate(mult):
            for i in range(2):
                self.res(f"down_blocks.{level}.resnets.{i}", f"input_blocks.{input_block}.0", channels != factor)
                channels = factor
                if scale in attention:
                    self.transformer(
                        f"down_blocks.{level}.attentions.{i}", f"input_blocks.{input_block}.1", depth[level]
                    )
                skipped.append(channels)
                input_block += 1
            if level != len(mult) - 1:
                self.names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{input_block}.0.op"
                skipped.append(channels)
                input_block += 1
                scale *= 2
        self.res("mid_block.resnets.0", "middle_block.0", False)
        self.transformer("mid_block.attentions.0", "middle_block.1", depth[-1])
        self.res("mid_block.resnets.1", "middle_block.2", False)
        output_block = 0
        for up, (level, _) in enumerate(reversed(list(enumerate(mult)))):
            for i in range(3):
                skipped.pop()  # joined to the input, so that it never has the output's width
                self.res(f"up_blocks.{up}.resnets.{i}", f"output_blocks.{output_block}.0", True)
                parts = 1
                if scale in attention:
                    self.transformer(f"up_blocks.{up}.attentions.{i}", f"output_blocks.{output_block}.1", depth[level])
                    parts = 2
                if level and i == 2:
                    self.names[f"up_blocks.{up}.upsamplers.0.conv"] = f"output_blocks.{output_block}.{parts}.conv"
                    scale //= 2
                output_block += 1
        assert not skipped

    def res(self, diffusers: str, original: str, widened: bool) -> None:
        self.names[f"{diffusers}.conv1"] = f"{original}.in_layers.2"
        self.names[f"{diffusers}.time_emb_proj"] = f"{original}.emb_layers.1"
        self.names[f"{diffusers}.conv2"] = f"{original}.out_layers.3"
        if widened:
            self.names[f"{diffusers}.conv_shortcut"] = f"{original}.skip_connection"

    def transformer(self, diffusers: str, original: str, depth: int) -> None:
        inside = [
            f"transformer_blocks.{d}.{layer}"
            for d in range(depth)
            for layer in "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 ff.net.0.proj ff.net.2 "
            "attn2.to_q attn2.to_k attn2.to_v attn2.to_out.0".split()
        ]
        for layer in ["proj_in", *inside, "proj_out"]:
            self.names[f"{diffusers}.{layer}"] = f"{original}.{layer}"


def full_size(kind: str) -> Any:
    with torch.device("meta"):
        return UNet2DConditionModel(**PUBLISHED[kind])


@pytest.fixture(scope="module", params=PUBLISHED)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def unet(kind: str) -> Any:
    return full_size(kind)


def test_both_statements_and_the_real_model_agree(kind: str, unet: Any) -> None:
    original = OriginalUNet(*ORIGINAL[kind]).names
    real = {n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert set(original) == real
    assert len(real) == {"sdxl": 794, "sd15": 282}[kind]

    stated = comfyui_names(PUBLISHED_LAYOUTS[kind])
    assert {module: stated.get(kohya_name(module)) for module in real} == original
    assert len({kohya_name(module) for module in real}) == len(real)


def test_the_layout_is_read_from_the_model(kind: str, unet: Any) -> None:
    assert block_layout(unet.config) == PUBLISHED_LAYOUTS[kind]


@pytest.mark.parametrize("groups", [GROUPS[:1], GROUPS[:2], GROUPS], ids="+".join)
def test_no_key_of_a_full_size_lora_is_missed(kind: str, groups: tuple[str, ...]) -> None:
    unet = full_size(kind)
    family = FAMILIES[kind]
    with torch.device("meta"):
        unet.add_adapter(LoraConfig(r=4, target_modules=family.target_modules(groups)))
    modules = adapted_layers(SimpleNamespace(unet=unet, text_encoders=[]), "default")  # type: ignore[arg-type]
    layers = {"sdxl": (582, 722, 788), "sd15": (160, 192, 278)}[kind][len(groups) - 1]  # kohya counts 722 and 192 too
    assert len(modules) == layers

    keys = [f"{family.kohya_prefix(module)}.{suffix}" for module in modules for suffix in KOHYA_SUFFIXES]
    check_against_naming_rules(keys, kind)
    accepted = {"lora_unet_" + name.replace(".", "_") for name in OriginalUNet(*ORIGINAL[kind]).names}
    assert [key for key in keys if key.partition(".")[0] not in accepted] == []


def test_depths_that_differ_within_a_block() -> None:
    """SSD-1B, a distilled SDXL: nested depths, and nothing but a residual block in the middle."""
    settings: dict[str, Any] = {
        **PUBLISHED["sdxl"],
        "transformer_layers_per_block": [0, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
        "mid_block_type": "UNetMidBlock2D",
    }
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(**settings)
    real = {n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    stated = comfyui_names(block_layout(unet.config))
    assert [name for name in sorted(real) if kohya_name(name) not in stated] == []
    assert stated["lora_unet_up_blocks_0_attentions_2_transformer_blocks_9_attn1_to_q"] == (
        "output_blocks.2.1.transformer_blocks.9.attn1.to_q"
    )
    assert "lora_unet_up_blocks_0_attentions_1_transformer_blocks_4_attn1_to_q" not in stated
    assert "lora_unet_mid_block_attentions_0_proj_in" not in stated


WRONG = {
    "of diffusers": "unet.mid_block.attentions.0.proj_in.lora_A.weight",
    "of peft": "base_model.model.mid_block.attentions.0.proj_in.lora_A.weight",
    "of another depth": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_2_attn1_to_q.alpha",
    "of a block without attention": "lora_unet_down_blocks_0_attentions_0_proj_in.alpha",
    "of the last block": "lora_unet_down_blocks_2_downsamplers_0_conv.alpha",
    "with dots": "lora_unet_mid_block.attentions.0.proj_in.alpha",
    "of another factor": "lora_unet_mid_block_attentions_0_proj_in.oft_blocks",
    "of a text encoder's norm": "lora_te1_text_model_encoder_layers_0_layer_norm1.alpha",
    "of a third text encoder": "lora_te3_text_model_encoder_layers_0_mlp_fc1.alpha",
}


@pytest.mark.parametrize("key", WRONG.values(), ids=WRONG)
def test_a_key_outside_the_rules_is_named(key: str) -> None:
    whole = [f"lora_unet_mid_block_attentions_0_proj_in.{suffix}" for suffix in KOHYA_SUFFIXES]
    check_against_naming_rules(whole, "sdxl")
    with pytest.raises(ExportError, match="ComfyUI would not load " + key.replace(".", r"\.") + ":"):
        check_against_naming_rules([*whole, key], "sdxl")


@pytest.mark.parametrize("suffix", KOHYA_SUFFIXES)
def test_a_layer_without_one_of_its_keys_is_named(suffix: str) -> None:
    """Without alpha ComfyUI would take the scale 1."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    with pytest.raises(ExportError, match=rf"lacks {name}\.{suffix}\."):
        check_against_naming_rules({f"{name}.{s}" for s in KOHYA_SUFFIXES} - {f"{name}.{suffix}"}, "sdxl")
