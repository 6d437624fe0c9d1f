"""Export: what is written is what was trained, another program reads it so, and a damaged file is noticed."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mapo_core import export, lora_check
from mapo_core.errors import ExportError
from mapo_core.export import export_lora, load_lora, read_lora, verify_lora
from mapo_core.families import FAMILIES, DiffusionModel, Family
from mapo_core.lora_adapter import live_modules
from mapo_core.lora_check import compare_predictions

ALL = ("attention", "feed_forward", "conv")
EPS = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
UNETS: dict[str, dict[str, Any]] = {
    "sdxl": {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": [1, 2],
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "cross_attention_dim": 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * 6 + 16,
    },
    "sd15": {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1, "attention_head_dim": 2}
    | {"cross_attention_dim": 24},
}


SDXL, SD15 = FAMILIES["sdxl"], FAMILIES["sd15"]
Damage = Callable[[dict[str, Tensor], dict[str, str]], None]


def fresh(kind: str = "sdxl", dtype: torch.dtype = torch.float32) -> DiffusionModel:
    """A small model of random weights, without text encoders, as they are dropped after caching."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=16, in_channels=4, out_channels=4, norm_num_groups=8, **UNETS[kind])  # type: ignore[call-arg]
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)  # type: ignore[call-arg]
    unet.to(dtype).requires_grad_(False)
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return DiffusionModel(
        family=kind, unet=unet, vae=vae, text_encoders=[], tokenizers=[None, None], noise_scheduler=None,
        sampling_scheduler=scheduler, prediction_type="epsilon", fingerprint="", resolution=16, latent_scale=1,
        source="",
    )  # fmt: skip


def trained(
    kind: str = "sdxl",
    groups: tuple[str, ...] = ("attention",),
    dtype: torch.dtype = torch.float32,
    name: str = "default",
    **settings: Any,
) -> DiffusionModel:
    """With an adapter of rank 4 and alpha 2 whose weights, in float32, are as if it had been trained."""
    model = fresh(kind, dtype)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 2, "target_modules": FAMILIES[kind].target_modules(groups), **settings})
    model.unet.add_adapter(lora, adapter_name=name)  # type: ignore[operator]
    draw = torch.Generator().manual_seed(3)
    for key, parameter in model.unet.named_parameters():
        if f".{name}.weight" in key:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.15
    return model


def layers(model: DiffusionModel, name: str = "default") -> dict[str, Any]:
    return {n: m for n, m in model.unet.named_modules() if hasattr(m, "lora_A") and name in m.lora_A}  # type: ignore[operator]


@torch.no_grad()
def predict(model: DiffusionModel) -> Tensor:
    """Another input than the export's own check."""
    draw = torch.Generator().manual_seed(9)
    first = next(model.unet.parameters())
    noise = lambda *shape: torch.randn(shape, generator=draw).to(first.dtype)  # noqa: E731
    arguments: dict[str, Any] = {"encoder_hidden_states": noise(1, 5, 24)}
    latents = noise(1, 4, 16, 16)
    if model.family == "sdxl":
        arguments["added_cond_kwargs"] = {"text_embeds": noise(1, 16), "time_ids": noise(1, 6)}
    model.unet.eval()
    return model.unet(latents, torch.tensor([400]), **arguments).sample.float()


def damage(source: Path, target: Path, change: Damage) -> Path:
    with safe_open(source, framework="pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


# --- what is written -------------------------------------------------------------------------------------------------


CASES = [
    *((kind, groups, "kohya", "fp16") for kind in UNETS for groups in (ALL[:1], ALL[:2], ALL)),
    *(("sdxl", ALL, layout, precision) for layout in ("kohya", "diffusers") for precision in ("fp32", "bf16")),
    ("sd15", ALL, "diffusers", "fp16"),
]


@pytest.mark.parametrize(("kind", "groups", "layout", "precision"), CASES)
def test_a_file_holds_the_adapter(
    kind: str, groups: tuple[str, ...], layout: Any, precision: Any, tmp_path: Path
) -> None:
    model, path = trained(kind, groups), tmp_path / "style.safetensors"
    report = export_lora(model, FAMILIES[kind], path, layout=layout, precision=precision)

    tensors, live = load_file(path), layers(model)
    assert report.modules == len(live) > 10
    assert report.keys == len(tensors) == len(live) * (3 if layout == "kohya" else 2)
    assert report.bytes == path.stat().st_size
    assert report.max_abs_difference is not None
    assert report.relative_difference is not None
    assert report.relative_difference < 2 * EPS[precision]
    assert (report.max_abs_difference == 0) == (precision == "fp32")

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    for name, layer in live.items():
        keys = (
            [f"lora_unet_{name.replace('.', '_')}.lora_{part}.weight" for part in ("down", "up")]
            if layout == "kohya"
            else [f"unet.{name}.lora_{part}.weight" for part in ("A", "B")]
        )
        for key, part in zip(keys, (layer.lora_A, layer.lora_B), strict=True):
            assert torch.equal(tensors[key], part["default"].weight.to(dtype)), key
        if layout == "kohya":
            alpha = tensors[keys[0].replace("lora_down.weight", "alpha")]
            assert alpha.shape == ()
            assert alpha.item() == 2.0


def test_the_diffusers_layout_has_the_keys_of_peft(tmp_path: Path) -> None:
    model, path = trained(groups=ALL), tmp_path / "style.safetensors"
    export_lora(model, SDXL, path, layout="diffusers")
    assert set(load_file(path)) == {f"unet.{key}" for key in get_peft_model_state_dict(model.unet)}


def test_convolutions_stay_four_dimensional(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    export_lora(trained(groups=("conv",)), SDXL, path)
    tensors = load_file(path)
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (4, 16, 3, 3)
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight"].shape == (16, 4, 1, 1)
    assert tensors["lora_unet_down_blocks_0_resnets_0_time_emb_proj.lora_down.weight"].shape == (4, 64)


SCALES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"attn1.to_q": 2, "conv2": 3}},
    "alpha pattern": {"alpha_pattern": {"attn1.to_q": 9.0, "ff.net.2": 1.0}},
    "all": {"use_rslora": True, "rank_pattern": {"attn1.to_q": 2}, "alpha_pattern": {"attn2.to_k": 7.0}},
}


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("scale", SCALES)
def test_the_update_of_every_layer_has_its_true_scale(scale: str, layout: Any, tmp_path: Path) -> None:
    """alpha / rank * up @ down out of the file, by hand, is what the live layer adds to its weight."""
    model, path = trained(groups=ALL, **SCALES[scale]), tmp_path / "style.safetensors"
    report = export_lora(model, SDXL, path, layout=layout, precision="fp32")
    file, tensors = read_lora(path), load_file(path)
    for name, layer in layers(model).items():
        stored = name if layout == "diffusers" else SDXL.kohya_prefix(name)
        down, up = ("lora_A", "lora_B") if layout == "diffusers" else ("lora_down", "lora_up")
        prefix = "unet." if layout == "diffusers" else ""
        down, up = (tensors[f"{prefix}{stored}.{part}.weight"].flatten(1) for part in (down, up))
        update = file.alphas[stored] / file.ranks[stored] * up @ down
        live = (
            layer.scaling["default"]
            * layer.lora_B["default"].weight.flatten(1)
            @ layer.lora_A["default"].weight.flatten(1)
        )
        assert torch.allclose(update, live, rtol=1e-5, atol=1e-8), name
    assert report.relative_difference is not None
    assert report.relative_difference < 1e-5


def test_rank_stabilised_alpha_is_scaled_by_the_root_of_the_rank(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    export_lora(trained(use_rslora=True, r=8, lora_alpha=4), SDXL, path, precision="fp16")
    alphas = {v.item() for k, v in load_file(path).items() if k.endswith(".alpha")}
    assert [*alphas] == pytest.approx([4 * 8**0.5], rel=1e-7)  # float16 would give 11.3125


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_base_may_be_in_half_precision(dtype: torch.dtype, layout: Any, precision: Any, tmp_path: Path) -> None:
    """diffusers rounds a LoRA to the model's precision; the file, and the proof, must not suffer from it."""
    model, path = trained(groups=ALL, dtype=dtype), tmp_path / "style.safetensors"
    report = export_lora(model, SDXL, path, layout=layout, precision=precision)
    assert report.relative_difference is not None
    assert report.relative_difference < (0.03 if dtype == torch.bfloat16 else 0.005)
    assert report.relative_difference == 0 or precision == "fp16"
    stored = next(v for k, v in load_file(path).items() if k.endswith(("lora_down.weight", "lora_A.weight")))
    assert stored.dtype == {"fp32": torch.float32, "fp16": torch.float16}[precision]


def test_another_adapter_name(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    report = export_lora(trained(name="style"), SDXL, path, adapter_name="style")
    assert report.modules == len(read_lora(path).modules)


def test_verify_can_be_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "verify_lora", lambda *_, **__: pytest.fail("asked for no proof"))
    report = export_lora(trained(), SDXL, tmp_path / "style.safetensors", verify=False)
    assert (report.max_abs_difference, report.relative_difference) == (None, None)


# --- what another program makes of it --------------------------------------------------------------------------------


def picture(model: DiffusionModel, family: Family, lora: Path | None = None) -> np.ndarray:
    """16 steps, decoded; `lora` is loaded as any user of diffusers would."""
    pipe = family.pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(str(lora))
    draw = torch.Generator().manual_seed(4)
    arguments: dict[str, Any] = {"prompt_embeds": torch.randn(1, 5, 24, generator=draw)}
    if family.name == "sdxl":
        arguments["pooled_prompt_embeds"] = torch.randn(1, 16, generator=draw)
    model.unet.eval()
    return pipe(
        **arguments, height=16, width=16, num_inference_steps=16, guidance_scale=1.0, generator=draw, output_type="np"
    ).images[0]


PIPELINES = [
    *(("sdxl", "kohya", scale) for scale in SCALES),
    ("sdxl", "diffusers", "all"),
    ("sd15", "kohya", "plain"),
    ("sd15", "diffusers", "all"),
]


@pytest.mark.parametrize(("kind", "layout", "scale"), PIPELINES)
def test_a_fresh_pipeline_makes_the_same_picture(kind: str, layout: Any, scale: str, tmp_path: Path) -> None:
    family = FAMILIES[kind]
    model, path = trained(kind, ALL, **SCALES[scale]), tmp_path / "style.safetensors"
    export_lora(model, family, path, layout=layout)
    live = picture(model, family)
    reloaded = picture(fresh(kind), family, path)
    base = picture(fresh(kind), family)
    assert np.abs(live - base).max() > 0.05
    assert np.abs(live - reloaded).max() < 2 / 255


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_lora_gives_the_trained_model(layout: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model, path = trained(groups=ALL, dtype=dtype), tmp_path / "style.safetensors"
    export_lora(model, SDXL, path, layout=layout, precision="fp32")
    other = fresh(dtype=dtype)
    base = predict(other)
    file = load_lora(other, SDXL, path, "compare")
    assert torch.equal(predict(other), predict(model))  # also in bfloat16: the weights were not rounded
    assert not torch.equal(predict(other), base)
    assert file.layout == layout
    assert not [n for n, p in other.unet.named_parameters() if p.requires_grad]


def test_load_lora_beside_another_adapter(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "style.safetensors"
    export_lora(model, SDXL, path, precision="fp32")
    expected = predict(model)
    for parameter in (p for n, p in model.unet.named_parameters() if "lora_B.default" in n):
        parameter.data.zero_()
    load_lora(model, SDXL, path, "compare")
    assert torch.equal(predict(model), expected)
    with pytest.raises(ExportError, match="already has an adapter 'compare'"):
        load_lora(model, SDXL, path, "compare")


def test_load_lora_of_another_model_names_its_layers(tmp_path: Path) -> None:
    path = tmp_path / "style.safetensors"
    export_lora(trained("sd15", ("conv",)), SD15, path)
    with pytest.raises(ExportError, match="has no layer for lora_unet_down_blocks_1_downsamplers_0_conv"):
        load_lora(fresh("sdxl"), SDXL, path, "compare")


# --- the model is left as it was -------------------------------------------------------------------------------------


def state_of(model: DiffusionModel) -> dict[str, Any]:
    unet: Any = model.unet
    return {
        "weights": {k: (id(p), p.dtype, p.detach().clone()) for k, p in unet.named_parameters()},
        "gradients": {k: p.requires_grad for k, p in unet.named_parameters()},
        "training": {k: m.training for k, m in unet.named_modules()},
        "modules": {k: id(m) for k, m in unet.named_modules()},
        "active": {k: list(m.active_adapters) for k, m in layers(model).items()},
        "disabled": {k: m.disable_adapters for k, m in layers(model).items()},
        "scaling": {k: dict(m.scaling) for k, m in layers(model).items()},
        "adapters": {k: v.to_dict() for k, v in unet.peft_config.items()},
        "forward": unet.__dict__.get("forward"),
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for what in before.keys() - {"weights", "random"}:
        assert before[what] == after[what], what
    assert before["weights"].keys() == after["weights"].keys()
    for key, (identity, dtype, values) in before["weights"].items():
        assert after["weights"][key][:2] == (identity, dtype), key
        assert torch.equal(after["weights"][key][2], values), key
    assert torch.equal(before["random"], after["random"])


BUSY = ["training", "another adapter active", "evaluating, adapter off", "wrapped by accelerate"]


@pytest.fixture(params=BUSY)
def busy(request: pytest.FixtureRequest) -> DiffusionModel:
    model = trained(groups=ALL, lora_dropout=0.3, dtype=torch.bfloat16)
    unet: Any = model.unet
    unet.train()
    for layer in list(layers(model).values())[::2]:
        layer.lora_A.requires_grad_(False)  # whatever someone has frozen stays so
    if request.param == "evaluating, adapter off":
        unet.eval()
        unet.mid_block.train()
        unet.disable_adapters()
    elif request.param == "another adapter active":
        unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name="other")
        unet.set_adapter("other")
    elif request.param == "wrapped by accelerate":
        unet.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(type(unet).forward), unet)
    return model


def test_the_model_is_untouched(busy: DiffusionModel, tmp_path: Path) -> None:
    before = state_of(busy)
    report = export_lora(busy, SDXL, tmp_path / "style.safetensors", precision="fp32")
    assert_same(before, state_of(busy))
    assert report.max_abs_difference == 0  # dropout and the wrapper's precision would show here


def test_the_proof_computes_in_the_models_own_precision(tmp_path: Path) -> None:
    """accelerate may have put autocast around forward; bfloat16 would drown what float16 loses of the weights."""
    model = trained()
    model.unet.forward = types.MethodType(torch.autocast("cpu", torch.bfloat16)(type(model.unet).forward), model.unet)
    with torch.autocast("cpu", torch.bfloat16):
        report = export_lora(model, SDXL, tmp_path / "style.safetensors")
    assert report.relative_difference is not None
    assert report.relative_difference < 2 * EPS["fp16"]


FAILURES: dict[str, tuple[Any, str, int]] = {
    "before loading": (StableDiffusionXLPipeline, "load_lora_weights", 1),
    "while layers are added": (LoraLinear, "update_layer", 5),
    "while weights are set": (UNet2DConditionModel, "load_state_dict", 1),
    "after loading": (lora_check, "_predict", 4),
}


@pytest.mark.parametrize("busy", BUSY[:2], indirect=True)
@pytest.mark.parametrize("when", FAILURES)
def test_the_model_is_untouched_by_a_failure(
    busy: DiffusionModel, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = state_of(busy)
    owner, name, last = FAILURES[when]
    real, calls = getattr(owner, name), []

    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == last:
            raise RuntimeError("broken")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises((ExportError, RuntimeError), match="broken"):
        export_lora(busy, SDXL, tmp_path / "style.safetensors")
    assert_same(before, state_of(busy))
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_said_on_success(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    model = trained(groups=ALL, **SCALES["all"])
    caplog.clear()
    with caplog.at_level("WARNING"):
        export_lora(model, SDXL, tmp_path / "style.safetensors")
    assert [str(w.message) for w in recwarn] == []
    assert caplog.messages == []


# --- damage ----------------------------------------------------------------------------------------------------------

TO_Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
TO_Q_PEFT = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def scale(key: str, factor: float) -> Damage:
    return lambda tensors, _: tensors.update({key: tensors[key] * factor})


def rename(old: str, new: str) -> Damage:
    return lambda tensors, _: tensors.update({k.replace(old, new): tensors.pop(k) for k in list(tensors) if old in k})


def one_bit(tensors: dict[str, Tensor], _: dict[str, str]) -> None:
    tensors[f"{TO_Q}.lora_up.weight"].view(torch.int16)[0, 0] ^= 1


def one_alpha(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    config = json.loads(metadata["lora_adapter_metadata"])
    config["unet.lora_alpha"] = 4.0
    metadata["lora_adapter_metadata"] = json.dumps(config)


DAMAGES: list[tuple[str, str, Damage, str]] = [
    ("a key dropped", "kohya", lambda t, _: t.pop(f"{TO_Q}.lora_up.weight"), rf"lacks {TO_Q}\.lora_up\.weight"),
    ("an alpha dropped", "kohya", lambda t, _: t.pop(f"{TO_Q}.alpha"), rf"lacks {TO_Q}\.alpha"),
    ("a layer renamed", "kohya", rename(TO_Q, TO_Q + "x"), rf"lacks {TO_Q}\.alpha.* in excess {TO_Q}x\.alpha"),
    ("a key too many", "kohya", lambda t, _: t.update({f"{TO_Q}.dora_scale": torch.ones(1)}), r"excess .*dora_scale"),
    ("a tensor scaled", "kohya", scale(f"{TO_Q}.lora_down.weight", 1.01), rf"down weights of {TO_Q} "),
    ("one bit", "kohya", one_bit, rf"up weights of {TO_Q} "),
    ("an alpha changed", "kohya", scale(f"{TO_Q}.alpha", 2), rf"up weights of {TO_Q} \(alpha 4\)"),
    ("not a number", "kohya", scale(f"{TO_Q}.lora_up.weight", float("nan")), rf"up weights of {TO_Q} "),
    ("another type", "kohya", lambda t, _: t.update({k: v.double() for k, v in t.items()}), "torch.float64"),
    ("a key dropped", "diffusers", lambda t, _: t.pop(f"{TO_Q_PEFT}.lora_B.weight"), r"lacks unet\.mid.*to_q\.lora_B"),
    ("a layer renamed", "diffusers", rename("mid_block.att", "mid.att"), r"lacks unet\.mid_block.*excess unet\.mid\."),
    ("a tensor scaled", "diffusers", scale(f"{TO_Q_PEFT}.lora_A.weight", 1.01), r"down weights of mid_block.*to_q "),
    ("the alpha changed", "diffusers", one_alpha, r"up weights of .* \(alpha 4\)"),
    ("no alpha", "diffusers", lambda _, m: m.pop("lora_adapter_metadata"), r"up weights of .* \(alpha 4\)"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionModel, dict[str, Path]]:
    """A model and its files in both layouts, which pass even after being read and written once more."""
    model, folder, paths = trained(groups=ALL), tmp_path_factory.mktemp("good"), {}
    for layout in ("kohya", "diffusers"):
        paths[layout] = folder / f"{layout}.safetensors"
        export_lora(model, SDXL, paths[layout], layout=layout, verify=False)
        verify_lora(model, SDXL, damage(paths[layout], folder / "again.safetensors", lambda *_: None))
    return model, paths


@pytest.mark.parametrize(("what", "layout", "change", "message"), DAMAGES, ids=[f"{d[0]}, {d[1]}" for d in DAMAGES])
def test_damage_is_named(what: str, layout: str, change: Damage, message: str, good: Any, tmp_path: Path) -> None:
    model, paths = good
    damaged = damage(paths[layout], tmp_path / "damaged.safetensors", change)
    with pytest.raises(ExportError, match=message):
        verify_lora(model, SDXL, damaged)


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_a_short_file_is_unreadable(size: int, tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "style.safetensors"
    export_lora(model, SDXL, path)
    path.write_bytes(path.read_bytes()[:size])
    for use in (lambda: verify_lora(model, SDXL, path), lambda: read_lora(path)):
        with pytest.raises(ExportError, match=r"Cannot read the LoRA .*style\.safetensors"):
            use()


def test_damage_between_writing_and_proof_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = trained(), tmp_path / "style.safetensors"
    export_lora(model, SDXL, path)
    old, real = path.read_bytes(), export._write

    def bad_disk(target: Path, data: bytes) -> None:
        real(target, data[:-1] + bytes([data[-1] ^ 1]))

    monkeypatch.setattr(export, "_write", bad_disk)
    with pytest.raises(ExportError, match=r"weights of lora_unet_.* are not the trained ones"):
        export_lora(model, SDXL, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_loader_that_misreads_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What diffusers 0.42 does to the alpha of a single attention layer, done to all."""
    model = trained()
    real = StableDiffusionXLPipeline.load_lora_weights

    def forgetful(self: Any, path: str, adapter_name: str) -> None:
        real(self, path, adapter_name=adapter_name)
        for layer in layers(model, adapter_name).values():
            layer.scaling[adapter_name] = 1.0

    monkeypatch.setattr(StableDiffusionXLPipeline, "load_lora_weights", forgetful)
    with pytest.raises(ExportError, match=r"reads the scale of down_blocks.* as 1 instead of 0\.5"):
        export_lora(model, SDXL, tmp_path / "style.safetensors")


def test_predictions_are_held_against_the_precisions() -> None:
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(2, 4, 16, 16, generator=draw, dtype=torch.float64)
    live = base + 0.1 * torch.randn(base.shape, generator=draw, dtype=torch.float64)
    eps = {"compute_eps": EPS["fp32"], "storage_eps": EPS["fp16"]}
    effect = live - base

    near = live + 5e-4 * effect
    result = compare_predictions("x", base, live, near, near, **eps)
    assert result.relative_difference == pytest.approx(5e-4)
    assert result.max_abs_difference == pytest.approx((near - live).abs().max().item())
    assert result.arithmetic_difference == 0

    with pytest.raises(ExportError, match="does not predict what the trained one predicts"):
        compare_predictions("x", base, live, live, near, **eps)
    with pytest.raises(ExportError, match=r"loses 2\.0% of what x does"):
        compare_predictions("x", base, live, live + 0.02 * effect, live + 0.02 * effect, **eps)
    with pytest.raises(ExportError, match="does not predict"):
        compare_predictions("x", base, live, near, near * float("nan"), **eps)
    with pytest.raises(ExportError, match="does not predict"):
        compare_predictions("x", base, live * float("nan"), near, near, **eps)
    assert compare_predictions("x", base, base, base, base, **eps).relative_difference == 0


# --- what cannot be exported -----------------------------------------------------------------------------------------


def set_up_weight(model: DiffusionModel, value: float) -> str:
    name, layer = next(iter(layers(model).items()))
    layer.lora_B["default"].weight.data[0, 0] = value
    return name.replace(".", "_")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    model = trained()
    name = set_up_weight(model, value)
    with pytest.raises(ExportError, match=f"not finite: lora_unet_{name}.lora_up.weight"):
        export_lora(model, SDXL, tmp_path / "style.safetensors", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_numbers_too_large_for_the_precision(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "style.safetensors"
    set_up_weight(model, 1e5)
    with pytest.raises(ExportError, match=r"set export\.precision to bf16"):
        export_lora(model, SDXL, path)
    export_lora(model, SDXL, path, precision="bf16")


def test_numbers_too_small_for_the_precision(tmp_path: Path) -> None:
    model, path = trained(), tmp_path / "style.safetensors"
    for layer in layers(model).values():
        layer.lora_A["default"].weight.data *= 2e4
        layer.lora_B["default"].weight.data *= 1e-7
    with pytest.raises(ExportError, match=r"stored precision loses .* of what style\.safetensors"):
        export_lora(model, SDXL, path)
    export_lora(model, SDXL, path, precision="bf16")


def test_an_untrained_adapter_can_be_exported(tmp_path: Path) -> None:
    model = trained()
    for layer in layers(model).values():
        layer.lora_B["default"].weight.data.zero_()
    report = export_lora(model, SDXL, tmp_path / "style.safetensors")
    assert (report.max_abs_difference, report.relative_difference) == (0, 0)


def test_no_adapter_and_other_adapters(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no LoRA named 'default'"):
        live_modules(fresh())
    model = trained(target_modules=["to_out.0"], lora_bias=True)
    with pytest.raises(ExportError, match=r"to_out\.0 has a variant of LoRA"):
        export_lora(model, SDXL, tmp_path / "style.safetensors")


def test_a_folder_that_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"Cannot write .*style\.safetensors.*mapo export RUN"):
        export_lora(trained(), SDXL, tmp_path / "file" / "style.safetensors")


def test_a_layer_that_comfyui_does_not_know(tmp_path: Path) -> None:
    class Odd(type(SDXL)):
        def kohya_prefix(self, module: str) -> str:
            return super().kohya_prefix(module).replace("mid_block", "middle")

    with pytest.raises(ExportError, match="ComfyUI would not load lora_unet_middle_attentions"):
        export_lora(trained(), Odd(), tmp_path / "style.safetensors")
