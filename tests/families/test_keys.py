"""Names of tensors, of LoRA targets and the packaged architectures, on full-size models without memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file
from torch import nn

from mapo_core.families import FAMILIES
from mapo_core.families._blueprint import BLUEPRINTS, CLIP_VOCABULARY
from tests.families import checkpoints
from tests.families.conftest import Tiny

# Parameters of the published models.
PUBLISHED = {
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
}


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def full(request: pytest.FixtureRequest) -> tuple[str, dict[str, nn.Module]]:
    return request.param, checkpoints.empty_modules(request.param)


def test_packaged_architectures_are_the_published_ones(full: tuple[str, dict[str, nn.Module]]) -> None:
    name, modules = full
    assert {n: sum(p.numel() for p in m.parameters()) for n, m in modules.items()} == PUBLISHED[name]


def test_full_size_names_agree_with_diffusers(full: tuple[str, dict[str, nn.Module]]) -> None:
    """Our names of a single file's tensors, read by diffusers' own converters, give back every parameter."""
    name, modules = full
    tensors = checkpoints.ldm_tensors(name, modules)
    assert theirs.CHECKPOINT_KEY_NAMES["xl_base" if name == "sdxl" else "v1"] in tensors
    assert theirs.infer_diffusers_model_type(tensors) == ("xl_base" if name == "sdxl" else "v1")
    unet, vae = modules["unet"], modules["vae"]
    same_shapes(theirs.convert_ldm_unet_checkpoint(dict(tensors), unet.config), unet)
    same_shapes(theirs.convert_ldm_vae_checkpoint(dict(tensors), vae.config), vae)
    for text in BLUEPRINTS[name].text:
        module = modules[text.name]
        if text.layout == "open_clip":
            same_shapes(theirs.convert_open_clip_checkpoint(module, dict(tensors), text.prefix), module)
        else:
            same_shapes(theirs.convert_ldm_clip_checkpoint(dict(tensors), f"{text.prefix}transformer."), module)


def same_shapes(converted: dict[str, torch.Tensor], module: nn.Module) -> None:
    def plain(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        return {k.removeprefix("text_model."): tuple(v.shape) for k, v in state.items()}

    assert plain(converted) == plain(module.state_dict())


def test_values_agree_with_diffusers(tiny: Tiny) -> None:
    """The same on real numbers: diffusers' converters give back the weights that went into the single file."""
    tensors, modules = load_file(tiny.file), tiny.modules()
    pairs = [
        (theirs.convert_ldm_unet_checkpoint(dict(tensors), modules["unet"].config), modules["unet"]),
        (theirs.convert_ldm_vae_checkpoint(dict(tensors), modules["vae"].config), modules["vae"]),
    ]
    for text in BLUEPRINTS[tiny.name].text:
        module = modules[text.name]
        if text.layout == "clip":
            pairs.append((theirs.convert_ldm_clip_checkpoint(dict(tensors), f"{text.prefix}transformer."), module))
    for converted, module in pairs:
        wanted = {k.removeprefix("text_model."): v for k, v in module.state_dict().items()}
        converted = {k.removeprefix("text_model."): v for k, v in converted.items()}
        assert converted.keys() == wanted.keys()
        for key, value in wanted.items():
            assert torch.equal(converted[key], value), key


def test_open_clip_values_agree_with_diffusers(tiny: Tiny) -> None:
    if tiny.name != "sdxl":
        pytest.skip("SD 1.5 has no open_clip encoder")
    tensors, module = load_file(tiny.file), tiny.pipe.text_encoder_2
    text = BLUEPRINTS["sdxl"].text[1]
    converted = theirs.convert_open_clip_checkpoint(module, dict(tensors), text.prefix)
    wanted = module.state_dict()
    assert converted.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(converted[key], value), key


def peft_targets(unet: nn.Module, groups: tuple[str, ...], family: str) -> set[str]:
    """As peft matches a list of names."""
    targets = FAMILIES[family].target_modules(groups)
    return {n for n, _ in unet.named_modules() if any(n == t or n.endswith(f".{t}") for t in targets)}


def test_lora_targets(full: tuple[str, dict[str, nn.Module]]) -> None:
    name, modules = full
    unet = modules["unet"]
    attention = peft_targets(unet, ("attention",), name)
    feed_forward = peft_targets(unet, ("feed_forward",), name)
    conv = peft_targets(unet, ("conv",), name)
    assert not attention & feed_forward
    assert not (attention | feed_forward) & conv
    for module in attention | feed_forward | conv:
        assert isinstance(unet.get_submodule(module), nn.Linear | nn.Conv2d), module
    # kohya: every linear layer and convolution in Transformer2DModel; with conv_dim, those in ResnetBlock2D,
    # Downsample2D and Upsample2D as well.
    parents = {n: type(m).__name__ for n, m in unet.named_modules()}

    def inside(*classes: str) -> set[str]:
        roots = tuple(f"{n}." for n, c in parents.items() if c in classes)
        return {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and n.startswith(roots)}

    assert attention | feed_forward == inside("Transformer2DModel")
    assert conv == inside("ResnetBlock2D", "Downsample2D", "Upsample2D")
    counts = {"sdxl": (582, 140, 66), "sd15": (160, 32, 86)}
    assert (len(attention), len(feed_forward), len(conv)) == counts[name]


def test_kohya_names(full: tuple[str, dict[str, nn.Module]]) -> None:
    name, modules = full
    family = FAMILIES[name]
    everything = peft_targets(modules["unet"], ("attention", "feed_forward", "conv"), name)
    assert len({family.kohya_prefix(m) for m in everything}) == len(everything)
    one = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    assert family.kohya_prefix(one) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"


def test_importing_the_families_is_light() -> None:
    code = (
        "import sys; from mapo_core import families; from mapo_core.families import FAMILIES, detect;"
        "FAMILIES['sdxl'].target_modules(['attention']); FAMILIES['sd15'].kohya_prefix('a.b');"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'accelerate', 'peft') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_tokenizers_do_not_need_torch() -> None:
    code = (
        "import sys; from mapo_core.families import Detected, count_tokens, load_tokenizers;"
        "print(count_tokens(load_tokenizers(Detected('sd15', 'single_file', None)), 'a cat'), 'torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "2 False"
    assert result.stderr == ""


def test_loading_is_silent(tiny: Tiny) -> None:
    code = (
        "from mapo_core.config import ModelConfig; from mapo_core.families import FAMILIES; import logging;"
        f"m = FAMILIES[{tiny.name!r}].load(ModelConfig(path={str(tiny.folder)!r}));"
        f"FAMILIES[{tiny.name!r}].pipeline(m); FAMILIES[{tiny.name!r}].encode_prompts(m, ['a cat']);"
        "logging.getLogger('transformers.utils.import_utils').warning('another notice')"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == ""
    assert result.stderr.strip() == "[transformers] another notice"


def test_assets_are_whole() -> None:
    assert "Copyright (c) 2021 OpenAI" in (CLIP_VOCABULARY / "LICENSE").read_text(encoding="utf-8")
    assert len(json.loads((CLIP_VOCABULARY / "vocab.json").read_text(encoding="utf-8"))) == 49408
    assert len((CLIP_VOCABULARY / "merges.txt").read_text(encoding="utf-8").splitlines()) == 48895
