"""The header of a LoRA file: what other programs look for, our own entries, and nothing private."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mapo_core.config import TrainConfig, build_config
from mapo_core.lora_file import (
    LoraModule,
    adapter_metadata,
    diffusers_tensors,
    kohya_tensors,
    lora_info,
    read_lora,
    serialise,
)
from mapo_core.lora_keys import kohya_name
from mapo_core.lora_metadata import lora_metadata, public_name


class Family:
    name = "sdxl"
    title = "Stable Diffusion XL"
    architecture = "stable-diffusion-xl-v1-base"
    base_model_version = "sdxl_base_v1-0"
    resolution = 1024


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "name": "ink wash",
        "seed": 7,
        "model": {"path": "/home/anna/models/My Model.safetensors"},
        "data": {"pairs": "/home/anna/watercolours/pairs.jsonl"},
        "adapter": {"rank": 16, "alpha": 8.0},
        "export": {"trigger": "inkw"},
        "parent": "/home/anna/runs/older",
    }
    return build_config({**values, **changes})


def header(settings: TrainConfig | None = None, **changes: Any) -> dict[str, str]:
    arguments: dict[str, Any] = {
        "steps_done": 300,
        "pairs_count": 128,
        "pairs_sha256": "ab" * 32,
        "base_model_name": "/home/anna/models/My Model.safetensors",
        "base_model_hash": "cd" * 32,
        "held_out": {"accuracy": 0.75, "accuracy_base": 0.5},
        "thumbnail": Image.new("RGBA", (1024, 512), "red"),
        "started": 1_790_000_000.5,
        "finished": 1_790_003_600.5,
        "precision": "bf16",
        "version": "0.1.0",
    }
    return lora_metadata(settings or config(), Family(), **{**arguments, **changes})  # type: ignore[arg-type]


def modules() -> list[LoraModule]:
    draw = torch.Generator().manual_seed(0)
    noise = lambda *shape: torch.randn(shape, generator=draw)  # noqa: E731
    return [
        LoraModule("mid_block.attentions.0.proj_in", {"lora_down": noise(4, 8), "lora_up": noise(8, 4)}, 2.0),
        LoraModule("mid_block.resnets.0.conv1", {"lora_down": noise(4, 8, 3, 3), "lora_up": noise(8, 4, 1, 1)}, 2.0),
        LoraModule("mid_block.attentions.0.proj_out", {"lora_down": noise(2, 8), "lora_up": noise(8, 2)}, 6.0),
    ]


def test_what_kohya_and_webui_look_for() -> None:
    expected = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "16",
        "ss_network_alpha": "8.0",
        "ss_network_args": "{}",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_sd_model_name": "My Model.safetensors",
        "ss_new_sd_model_hash": "cd" * 32,
        "ss_v2": "False",
        "ss_steps": "300",
        "ss_max_train_steps": "2000",
        "ss_learning_rate": "1e-05",
        "ss_unet_lr": "1e-05",
        "ss_num_train_images": "256",
        "ss_batch_size_per_device": "1",
        "ss_gradient_accumulation_steps": "16",
        "ss_seed": "7",
        "ss_mixed_precision": "bf16",
        "ss_resolution": "(1024, 1024)",
        "ss_training_started_at": "1790000000.5",
        "ss_training_finished_at": "1790003600.5",
        "ss_output_name": "ink wash",
        "ss_optimizer": "adamw8bit(betas=(0.9, 0.999),weight_decay=0.01,eps=1e-08)",
    }
    found = header()
    assert {key: found.get(key) for key in expected} == expected


def test_model_spec() -> None:
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "ink wash",
        "modelspec.date": "2026-09-21T15:13:20+00:00",
        "modelspec.resolution": "1024x1024",
        "modelspec.trigger_phrase": "inkw",
        "modelspec.prediction_type": "epsilon",
        "modelspec.encoder_layer": "2",
    }
    found = header()
    assert {key: found.get(key) for key in expected} == expected


def test_model_spec_of_other_models() -> None:
    other = config(model={"path": "demo", "clip_skip": 1}, export={}, data={"pairs": "pairs.jsonl", "resolution": 768})
    found = header(other, prediction_type="v_prediction", thumbnail=None, finished=None, base_model_name="demo")
    assert found["modelspec.prediction_type"] == "v"
    assert found["modelspec.encoder_layer"] == "3"
    assert found["ss_clip_skip"] == "2"
    assert found["modelspec.resolution"] == "768x768"
    absent = {"trigger_phrase", "usage_hint", "thumbnail", "date"}
    assert not {f"modelspec.{key}" for key in absent} & found.keys()


def test_resolution_of_a_model_that_is_not_a_published_one() -> None:
    assert header(resolution=64)["modelspec.resolution"] == "64x64"


def official(margin_weight: str) -> dict[str, str]:
    return {
        "parametrisation": "official",
        "margin_weight": margin_weight,
        "link_scale": "0.5",
        "logit_scale": "1000.0",
    }


def paper(beta: str) -> dict[str, str]:
    return {"parametrisation": "paper", "beta": beta}


METHODS: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    ({"type": "mapo"}, "m.safetensors", paper("64.0")),
    ({"type": "mapo", "parametrisation": "official"}, "m.safetensors", official("0.1")),
    ({"type": "mapo", "parametrisation": "official"}, "demo", official("0.02")),
    ({"type": "mapo", "margin_weight": 0.3}, "m.safetensors", official("0.3")),
    ({"type": "mapo", "parametrisation": "paper"}, "m.safetensors", paper("64.0")),
    ({"type": "mapo", "parametrisation": "paper", "beta": 8}, "m.safetensors", paper("8.0")),
    ({"type": "diffusion_dpo"}, "m.safetensors", {"beta": "5000.0"}),
    ({"type": "diffusion_dpo", "beta": 2000}, "m.safetensors", {"beta": "2000.0"}),
    ({"type": "sft"}, "m.safetensors", {}),
    (
        {"type": "mapo", "label_smoothing": 0.1, "safeguard": True},
        "m.safetensors",
        {**paper("64.0"), "label_smoothing": "0.1", "safeguard": "True"},
    ),
    (
        {"type": "diffusion_dpo", "label_smoothing": 0.1},
        "m.safetensors",
        {"beta": "5000.0", "label_smoothing": "0.1"},
    ),
]


@pytest.mark.parametrize(("method", "path", "expected"), METHODS)
def test_our_own_entries(method: dict[str, Any], path: str, expected: dict[str, str]) -> None:
    found = header(config(method=method, model={"path": path}))
    ours = {k.removeprefix("mapo."): v for k, v in found.items() if k.startswith("mapo.")}
    assert ours == {
        "method": method["type"],
        **expected,
        "pairs": "128",
        "pairs_sha256": "ab" * 32,
        "held_out_accuracy": "0.75",
        "held_out_accuracy_base": "0.5",
        "version": "0.1.0",
    }
    assert found["ss_num_train_images"] == ("128" if method["type"] == "sft" else "256")


def test_convolutions_are_declared_as_kohya_does() -> None:
    found = header(config(adapter={"rank": 4, "targets": ["attention", "conv"]}))
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "4", "conv_alpha": "4"}
    assert found["ss_network_alpha"] == "4"


def test_everything_is_text_and_finite() -> None:
    held_out = {"accuracy": math.nan, "margin": math.inf, "margin_base": None, "accuracy_base": 0.0}
    found = header(held_out=held_out, started=None, base_model_hash=None)
    assert all(isinstance(v, str) for v in found.values())
    assert {k for k in found if "held_out" in k} == {"mapo.held_out_accuracy_base"}
    assert not {v for v in found.values() if v.lower() in {"nan", "inf", "-inf"}}
    assert not {"ss_training_started_at", "ss_new_sd_model_hash"} & found.keys()


def test_nothing_tells_where_things_were() -> None:
    """A LoRA is shared: no folder, no user name, not of the model, the pairs or the parent run."""
    text = json.dumps({k: v for k, v in header().items() if k != "modelspec.thumbnail"})
    assert "ink wash" in text
    for private in ("/home", "anna", "watercolours", "older", "pairs.jsonl", str(Path.home()), str(Path.cwd())):
        assert private not in text, private


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/anna/models/a b.safetensors", "a b.safetensors"),
        (r"C:\Users\Anna\models\a b.safetensors", "a b.safetensors"),
        (r"\\server\anna\a.safetensors", "a.safetensors"),
        ("../anna/model", "model"),
        ("./model/", "model"),
        ("~/model", "model"),
        ("anna/model.safetensors", "model.safetensors"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stabilityai/stable-diffusion-xl-base-1.0"),
        ("demo", "demo"),
    ],
)
def test_public_name(source: str, name: str) -> None:
    assert public_name(source) == name


def test_a_local_folder_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "anna" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("anna/model") == "model"


def test_thumbnail() -> None:
    kind, _, content = header()["modelspec.thumbnail"].partition(",")
    picture = Image.open(io.BytesIO(base64.b64decode(content, validate=True)))
    assert kind == "data:image/jpeg;base64"
    assert picture.format == "JPEG"
    assert picture.size == (256, 128)
    red, green, blue = picture.getpixel((128, 64))  # type: ignore[misc]
    assert red > 240
    assert max(green, blue) < 15
    small = header(thumbnail=Image.new("L", (64, 48)))["modelspec.thumbnail"].partition(",")[2]
    assert Image.open(io.BytesIO(base64.b64decode(small))).size == (64, 48)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_round_trip(layout: str, tmp_path: Path) -> None:
    path, metadata = tmp_path / "x.safetensors", header()
    if layout == "kohya":
        path.write_bytes(serialise(kohya_tensors(modules(), "fp16", kohya_name), metadata))
        names = [kohya_name(m.name) for m in modules()]
    else:
        metadata = {**metadata, "lora_adapter_metadata": adapter_metadata(modules())}
        path.write_bytes(serialise(diffusers_tensors(modules(), "fp16"), metadata))
        names = [m.name for m in modules()]
    file = read_lora(path)
    assert metadata.items() <= file.metadata.items()
    assert (file.layout, file.precision) == (layout, "fp16")
    assert file.ranks == dict(zip(names, (4, 4, 2), strict=True))
    assert file.alphas == dict(zip(names, (2.0, 2.0, 2.0 if layout == "kohya" else 6.0), strict=True))
    assert set(file.modules) == set(names)


def test_one_alpha_for_all_layers_and_the_same_updates(tmp_path: Path) -> None:
    """diffusers 0.42 drops an attention layer's own alpha: the layer with alpha 6 gets 2 and up weights three times."""
    tensors = kohya_tensors(modules(), "fp32", kohya_name)
    assert {t.item() for k, t in tensors.items() if k.endswith(".alpha")} == {2.0}
    for module in modules():
        down, up = (tensors[f"{kohya_name(module.name)}.lora_{part}.weight"] for part in ("down", "up"))
        update = 2.0 / module.rank * up.flatten(1) @ down.flatten(1)
        own = module.weights
        expected = module.alpha / module.rank * own["lora_up"].flatten(1) @ own["lora_down"].flatten(1)
        assert torch.allclose(update, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(up, own["lora_up"]) == (module.alpha == 2.0)


def test_hashes_are_kohyas(tmp_path: Path) -> None:
    """As train_util.precalculate_safetensors_hashes: over a file with the ss_ entries only."""
    tensors = {"lora_unet_x.lora_down.weight": torch.arange(400_000, dtype=torch.float32)}  # legacy reads past 1 MiB
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    first.write_bytes(serialise(tensors, header()))
    second.write_bytes(serialise(tensors, {**header(), "modelspec.title": "another title"}))
    with safe_open(first, framework="pt") as file:
        found = file.metadata()

    save_file(tensors, tmp_path / "plain.safetensors", {k: v for k, v in header().items() if k.startswith("ss_")})
    plain = (tmp_path / "plain.safetensors").read_bytes()
    size = int.from_bytes(plain[:8], "little")
    assert found["sshs_model_hash"] == hashlib.sha256(plain[8 + size :]).hexdigest()
    assert found["sshs_legacy_hash"] == hashlib.sha256(plain[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert found["modelspec.hash_sha256"] == "0x" + hashlib.sha256(first.read_bytes()[-1_600_000:]).hexdigest()
    with safe_open(second, framework="pt") as file:
        assert {k: file.metadata()[k] for k in found if k.startswith("sshs")} == {
            k: v for k, v in found.items() if k.startswith("sshs")
        }
    assert torch.equal(load_file(first)["lora_unet_x.lora_down.weight"], tensors["lora_unet_x.lora_down.weight"])


def test_lora_info(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(serialise(kohya_tensors(modules(), "bf16", kohya_name), header()))
    lines = lora_info(read_lora(path)).splitlines()
    assert lines[:2] == ["x.safetensors: kohya layout, bf16, 3 layers", "rank 2, 4   alpha 2"]
    assert "mapo.held_out_accuracy: 0.75" in lines
    assert "modelspec.thumbnail: yes" in lines
    assert max(map(len, lines)) < 200


def test_a_file_without_alpha_has_scale_one(tmp_path: Path) -> None:
    tensors = {k: v for k, v in kohya_tensors(modules(), "fp32", kohya_name).items() if not k.endswith(".alpha")}
    save_file(tensors, tmp_path / "x.safetensors")
    file = read_lora(tmp_path / "x.safetensors")
    assert file.alphas == {name: float(rank) for name, rank in file.ranks.items()}
    assert file.metadata == {}
