from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from mapo_core.errors import ModelError
from mapo_core.families import _locate as locating
from mapo_core.families import detect

if TYPE_CHECKING:
    from tests.families.conftest import Tiny

UNET = "model.diffusion_model."


def names(*keys: str, **shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {k: torch.zeros(1) for k in keys} | {k: torch.zeros(s) for k, s in shapes.items()}


def unet(channels: int = 4, context: int = 768) -> dict[str, torch.Tensor]:
    return {
        f"{UNET}input_blocks.0.0.weight": torch.zeros(8, channels, 3, 3),
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, context),
    }


VAE = names("first_stage_model.decoder.conv_in.weight")
CLIP_L = names("cond_stage_model.transformer.text_model.embeddings.position_embedding.weight")
SDXL_L = names("conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight")
SDXL_G = names("conditioner.embedders.1.model.positional_embedding")

WRONG_FILES = {
    "lora": (names("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"), "is a LoRA,"),
    "peft lora": (names("unet.down_blocks.0.attentions.0.to_q.lora_A.weight"), "is a LoRA,"),
    "loha": (names("lora_unet_x.hada_w1_a"), "is a LoHa"),
    "lokr": (names("lora_unet_x.lokr_w1"), "is a LoKr"),
    "sd2": (unet(context=1024) | names("cond_stage_model.model.positional_embedding") | VAE, "is Stable Diffusion 2,"),
    "refiner": (
        unet(context=1280) | names("conditioner.embedders.0.model.positional_embedding"),
        "is the SDXL refiner",
    ),
    "sd3": (names(f"{UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias"), "is Stable Diffusion 3"),
    "flux": (names("double_blocks.0.img_attn.norm.key_norm.scale"), "is Flux"),
    "inpainting": (unet(channels=9) | CLIP_L | VAE, r"is an inpainting model \(9 input channels\)"),
    "pix2pix": (unet(channels=8) | CLIP_L | VAE, "is a model with 8 input channels"),
    "bare unet": (unet(context=2048), r"is a UNet alone \(of Stable Diffusion XL\) without text encoders"),
    "no text": (unet() | VAE, r"is a UNet and a VAE \(of Stable Diffusion 1\) without text encoders"),
    "unet, no prefix": (names("input_blocks.0.0.weight"), "is a UNet alone"),
    "diffusers unet": (names("down_blocks.0.resnets.0.conv1.weight"), "is a UNet alone.*diffusers folder"),
    "vae": (names("decoder.conv_in.weight", "encoder.conv_in.weight"), "is a VAE alone.*model.vae"),
    "clip": (names("text_model.encoder.layers.0.mlp.fc1.weight"), "is a text encoder alone"),
    "half sdxl": (unet(context=2048) | SDXL_L | VAE, r"is Stable Diffusion XL without text_encoder_2"),
    "controlnet": (names("control_model.input_blocks.0.0.weight"), "is a ControlNet"),
    "embedding": (names("emb_params"), "is a textual inversion embedding"),
    "quantised": (unet() | CLIP_L | names(f"{UNET}out.2.scale_weight"), "is a quantised checkpoint"),
    "playground": (unet() | SDXL_L | SDXL_G | names("edm_mean"), "is an EDM model"),
    "unknown": (names("a.b.c", "d.e.f"), r"no checkpoint that is known here \(its tensors: a.b.c, d.e.f\)"),
    "nothing": ({}, "no tensor at all"),
}


@pytest.mark.parametrize(("tensors", "message"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_other_files_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with pytest.raises(ModelError, match=message) as caught:
        detect(path)
    assert str(caught.value).startswith(str(path))


SAFE = (2).to_bytes(8, "little") + b"{}"
DAMAGED = {
    "empty": (b"", "is empty"),
    "short": (b"abc", "is not a safetensors file"),
    "web page": (b"<!DOCTYPE html><html>" + b" " * 300, "is a web page"),
    "json answer": (b'{"error": "not signed in"}', "is not a safetensors file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 6938078334\n", "is a Git LFS pointer"),
    "zip pickle": (b"PK\x03\x04" + b"\0" * 300, "is a pickle"),
    "old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF" + b"\0" * 300, "is a pickle"),
    "gguf": (b"GGUF\x03\0\0\0" + b"\0" * 300, "is a GGUF file"),
    "header cut off": ((10_000).to_bytes(8, "little") + b'{"a":' + b" " * 100, "is cut off"),
    "header damaged": ((5).to_bytes(8, "little") + b'{"a":' + b" " * 100, "damaged safetensors header"),
    "header of lists": ((9).to_bytes(8, "little") + b'{"a": []}', "damaged safetensors header"),
    "no tensors": (SAFE, "no tensor at all"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED.keys())
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        detect(path)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(unet() | CLIP_L | VAE, path)
    whole = path.read_bytes()
    assert detect(path).family == "sd15"
    for length in (*range(0, 40), len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            detect(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is a pickle.*Save Checkpoint"):
        detect(path)


def test_flags_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    xl = unet(context=2048) | SDXL_L | SDXL_G | VAE
    save_file(xl, path)
    found = detect(str(path))
    assert (found.family, found.kind, found.path) == ("sdxl", "single_file", path)
    assert (found.prediction_type, found.zero_terminal_snr) == (None, None)
    empty = torch.tensor([])
    save_file(xl | {"v_pred": empty}, path)
    assert (detect(path).prediction_type, detect(path).zero_terminal_snr) == ("v_prediction", None)
    save_file(xl | {"v_pred": empty, "ztsnr": empty}, path)
    assert (detect(path).prediction_type, detect(path).zero_terminal_snr) == ("v_prediction", True)
    save_file(xl, path, {"modelspec.prediction_type": "v"})
    assert detect(path).prediction_type == "v_prediction"
    save_file(xl, path, {"modelspec.prediction_type": "epsilon"})
    assert detect(path).prediction_type is None


def test_tiny_models_are_recognised_in_both_forms(tiny: Tiny) -> None:
    assert (detect(tiny.folder).family, detect(tiny.folder).kind) == (tiny.name, "diffusers")
    assert (detect(tiny.file).family, detect(tiny.file).kind) == (tiny.name, "single_file")
    assert detect(tiny.folder).prediction_type == "epsilon"
    assert detect(tiny.file, tiny.name).family == tiny.name


def folder(path: Path, pipeline: str, config: dict[str, object]) -> Path:
    for part in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        (path / part).mkdir(parents=True)
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    (path / "unet" / "config.json").write_text(json.dumps(config))
    (path / "scheduler" / "scheduler_config.json").write_text("{}")
    return path


WRONG_FOLDERS = {
    "sd2": ("StableDiffusionPipeline", {"in_channels": 4, "cross_attention_dim": 1024}, "is Stable Diffusion 2"),
    "inpainting": ("StableDiffusionXLInpaintPipeline", {"in_channels": 9}, "is an inpainting model"),
    "refiner": (
        "StableDiffusionXLImg2ImgPipeline",
        {"in_channels": 4, "cross_attention_dim": 1280},
        "the SDXL refiner",
    ),
    "flux": ("FluxPipeline", {}, "is a FluxPipeline"),
}


@pytest.mark.parametrize(("pipeline", "config", "message"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS.keys())
def test_other_folders_are_named(tmp_path: Path, pipeline: str, config: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        detect(folder(tmp_path / "m", pipeline, config))


def test_incomplete_folders(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", "StableDiffusionXLPipeline", {"in_channels": 4})
    assert detect(path).prediction_type is None
    (path / "tokenizer_2").rmdir()
    with pytest.raises(ModelError, match=r"has no tokenizer_2/"):
        detect(path)
    (path / "scheduler" / "scheduler_config.json").write_text("{")
    (path / "tokenizer_2").mkdir()
    with pytest.raises(ModelError, match=r"is not valid JSON"):
        detect(path)
    (path / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"Cannot read .*scheduler_config.json"):
        detect(path)


def test_hints_for_the_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Give the folder that holds it"):
        detect(tmp_path)
    inner = folder(tmp_path / "inner", "StableDiffusionXLPipeline", {})
    with pytest.raises(ModelError, match=r"may be one level below: .*inner"):
        detect(tmp_path)
    save_file(names("a"), inner / "unet" / "x.safetensors")
    with pytest.raises(ModelError, match="one component of a model"):
        detect(inner / "unet")
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    save_file(names("a"), checkpoints / "b.safetensors")
    with pytest.raises(ModelError, match=r"Give one of its files instead, for example .*b\.safetensors"):
        detect(checkpoints)


@pytest.mark.parametrize("source", ["nowhere/model.safetensors", "/nowhere/at/all", "C:\\models\\x", "name", ""])
def test_nothing_there(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    if source == "":
        source = str(tmp_path / "missing")
    with pytest.raises(ModelError, match="There is no model at"):
        detect(source)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline Hub with an empty cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_hub_id_that_cannot_be_had(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no folder some/model.*cannot be downloaded.*Connect to the internet"):
        detect("some/model")
    with pytest.raises(ModelError, match=r"revision v2"):
        detect("some/model", revision="v2")


def test_a_hub_id_from_the_cache(hub: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mapo_core.config import ModelConfig

    monkeypatch.chdir(tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = hub / "models--some--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    (place / "snapshots").mkdir()
    (place / "snapshots" / commit).symlink_to(tiny.folder)
    tree = [p.relative_to(tiny.folder).as_posix() for p in tiny.folder.rglob("*") if p.is_file()]
    fetched: list[set[str]] = []

    def recording(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        fetched.append({f for f in tree if any(fnmatch(f, p) for p in allow_patterns)})
        return snapshot_download(repo, revision=revision, allow_patterns=allow_patterns)

    snapshot_download = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", recording)
    found = detect("some/model")
    assert (found.family, found.kind) == (tiny.name, "hub")
    assert not any(f.endswith(".safetensors") for f in fetched[-1])
    assert {"model_index.json", "unet/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"} <= fetched[-1]
    model = tiny.family.load(ModelConfig(path="some/model"))
    assert {f for f in fetched[-1] if f.endswith(".safetensors")} == {f for f in tree if f.endswith(".safetensors")}
    assert torch.equal(model.unet.conv_in.weight, tiny.pipe.unet.conv_in.weight)  # pyright: ignore
    assert model.source == "some/model"


def test_demo(monkeypatch: pytest.MonkeyPatch, tiny: Tiny, tmp_path: Path) -> None:
    monkeypatch.setattr(locating, "DEMO_MODEL", tiny.folder)
    assert detect("demo").path == tiny.folder
    monkeypatch.setattr(locating, "DEMO_MODEL", tmp_path / "missing")
    with pytest.raises(ModelError, match="built-in demo model is missing"):
        detect("demo")
