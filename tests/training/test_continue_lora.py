"""Going on from a LoRA file, merging files into the base, and writing a LoRA at a smaller rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_core import ConfigError, ModelError
from mapo_core.adapter import adapter_off, add_lora, encode_prompts
from mapo_core.export import export_lora, load_lora, read_lora
from mapo_core.families import FAMILIES
from mapo_core.lora_adapter import live_modules
from mapo_core.lora_check import _predict
from mapo_core.lora_file import lora_update
from mapo_core.lora_resize import resize
from mapo_core.reopen import export_run, open_trained
from mapo_core.runs import read_events
from mapo_core.sections import AdapterConfig, ModelConfig
from mapo_core.session import prepare

from .conftest import Run, lora_of, run_here

SDXL = FAMILIES["sdxl"]
FILES = ["lora kohya", "lora diffusers", "dora kohya", "loha kohya", "lokr kohya"]


@pytest.fixture(scope="module")
def files(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRA files as if trained before, of other ranks than the runs' own settings."""
    folder, found = tmp_path_factory.mktemp("loras"), {}
    for kind, layout in (which.split() for which in FILES):
        model = SDXL.load(ModelConfig(path=str(tiny_model)), encoders=False)
        config = AdapterConfig(type=kind, rank=3, alpha=2, targets=("attention", "conv"), rank_pattern=("conv1=2",))  # type: ignore[arg-type]
        add_lora(model, SDXL, config, 0)
        draw = torch.Generator().manual_seed(5)
        for parameter in (p for p in model.unet.parameters() if p.requires_grad):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
        found[f"{kind} {layout}"] = folder / f"{kind}-{layout}.safetensors"
        export_lora(model, SDXL, found[f"{kind} {layout}"], layout=layout, precision="fp32")  # type: ignore[arg-type]
    return found


def with_file(tiny_model: Path, path: Path) -> Any:
    model = SDXL.load(ModelConfig(path=str(tiny_model)), encoders=False)
    load_lora(model, SDXL, path, "compare")
    return model


@pytest.mark.parametrize("which", FILES)
def test_a_file_is_where_training_starts_and_its_reference(
    new_run: Run, files: dict[str, Path], tiny_model: Path, which: str
) -> None:
    settings: dict[str, Any] = {
        "adapter": {"type": which.split()[0], "rank": 8, "init_from": str(files[which])},
        "training": {"steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 1},
        "checkpoint": {"every_steps": 1, "keep": 5},
        "optimizer": {"learning_rate": 1e-2},
    }
    session = prepare(new_run(f"look {which}", **settings), None, None)
    theirs = _predict(with_file(tiny_model, files[which]), ["compare"])
    assert torch.allclose(_predict(session.model, ["default"]), theirs, atol=1e-5)
    assert {m.rank for m in live_modules(session.model)} == set(read_lora(files[which]).ranks.values())
    names = [n for n, p in session.model.unet.named_parameters() if p.requires_grad]
    assert names
    assert all(".default" in n for n in names)
    for parameter in session.parameters:
        parameter.data += 0.1
    sample = torch.zeros(1, 4, 8, 8), torch.tensor([5]), torch.zeros(1, 7, 32)
    added = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
    session.model.unet.eval()
    with torch.no_grad(), adapter_off(session.model.unet):
        reference = session.model.unet(*sample, added_cond_kwargs=added).sample
    with torch.no_grad():
        other = with_file(tiny_model, files[which]).unet.eval()(*sample, added_cond_kwargs=added).sample
    assert torch.allclose(reference, other, atol=1e-5)
    assert [n for n, p in session.model.unet.named_parameters() if p.requires_grad] == names

    run = new_run(f"whole {which}", **settings)
    run_here(run)
    first = next(e for e in read_events(run.events) if e["type"] == "evaluated")
    assert first["chosen_mse"] == first["base"]["chosen_mse"]
    parts = new_run(f"parts {which}", **{**settings, "training": {**settings["training"], "steps": 1}})
    run_here(parts)
    text = parts.config.read_text().replace('"steps": 1', '"steps": 2')
    parts.config.write_text(text.replace(".safetensors", ".gone"))
    run_here(parts)  # from the run's own copy of the file
    a, b = lora_of(run), lora_of(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
    trained = open_trained(run)
    report = export_lora(trained.model, SDXL, run.export / "again.safetensors", precision="fp32")
    assert report.relative_difference is not None


# --- files with layers of the text encoders ---------------------------------------------------------------------------

TEXT: dict[str, Any] = {"text_encoder": True, "rank": 8, "targets": ["attention", "feed_forward"]}
PROMPTS = ["a star", "a red boat on a lake"]


@pytest.fixture(scope="module", params=["kohya", pytest.param("diffusers", marks=pytest.mark.slow)])
def text_file(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the denoiser and both text encoders, as if trained before."""
    model = SDXL.load(ModelConfig(path=str(tiny_model)))
    config = AdapterConfig(rank=3, text_encoder=True, targets=("attention", "feed_forward"))
    draw = torch.Generator().manual_seed(5)
    for group in add_lora(model, SDXL, config, 0):
        for parameter in group.parameters.values():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    path = tmp_path_factory.mktemp("text") / f"text-{request.param}.safetensors"
    export_lora(model, SDXL, path, layout=request.param, precision="fp32")
    return path


def encoded(model: Any, *, base: bool) -> torch.Tensor:
    return torch.cat([e["prompt_embeds"] for e in encode_prompts(model, SDXL, PROMPTS, base=base)])


def test_a_file_with_layers_of_the_text_encoders_is_where_they_start_and_their_reference(
    new_run: Run, text_file: Path, tiny_model: Path
) -> None:
    settings: dict[str, Any] = {
        "adapter": {**TEXT, "init_from": str(text_file)},
        "training": {"steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 1},
        "checkpoint": {"every_steps": 1, "keep": 5},
        "optimizer": {"learning_rate": 1e-2},
    }
    session = prepare(new_run("text look", **settings), None, None)
    plain, loaded = (SDXL.load(ModelConfig(path=str(tiny_model))) for _ in range(2))
    load_lora(loaded, SDXL, text_file, "compare")
    theirs = torch.cat([e["prompt_embeds"] for e in SDXL.encode_prompts(loaded, PROMPTS)])
    before = torch.cat([e["prompt_embeds"] for e in SDXL.encode_prompts(plain, PROMPTS)])
    assert not torch.allclose(theirs, before, atol=1e-2)
    assert torch.allclose(encoded(session.model, base=False), theirs, atol=1e-5)
    assert [g.name for g in session.groups] == ["unet", "text_encoder", "text_encoder_2"]
    assert {m.rank for m in live_modules(session.model)} == {3}
    for parameter in session.parameters:
        parameter.data += 0.1
    assert torch.allclose(encoded(session.model, base=True), theirs, atol=1e-5)  # the reference stays
    assert not torch.allclose(encoded(session.model, base=False), theirs, atol=1e-2)
    prompt = session.pairs.entries[0].prompt  # what the cache holds for the reference is encoded with the file
    (expected,) = SDXL.encode_prompts(loaded, [prompt])
    assert torch.allclose(session.pairs.prompt(prompt)["prompt_embeds"], expected["prompt_embeds"], atol=1e-5)

    run = new_run("text whole", **settings)
    run_here(run)
    first = next(e for e in read_events(run.events) if e["type"] == "evaluated")
    assert first["chosen_mse"] == pytest.approx(first["base"]["chosen_mse"], rel=1e-6)
    parts = new_run("text parts", **{**settings, "training": {**settings["training"], "steps": 1}})
    run_here(parts)
    parts.config.write_text(parts.config.read_text().replace('"steps": 1', '"steps": 2'))
    run_here(parts)
    a, b = lora_of(run), lora_of(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
    again = SDXL.load(ModelConfig(path=str(tiny_model)))
    load_lora(again, SDXL, export_run(run, precision="fp32"), "again")
    live = encoded(open_trained(run).model, base=False)
    assert torch.allclose(torch.cat([e["prompt_embeds"] for e in SDXL.encode_prompts(again, PROMPTS)]), live, atol=1e-5)


def test_text_encoders_that_the_file_has_and_the_run_does_not_train_are_an_error(new_run: Run, text_file: Path) -> None:
    with pytest.raises(ConfigError, match="changes text_encoder and text_encoder_2 too"):
        prepare(new_run("text wrong", adapter={"init_from": str(text_file)}), None, None)


def test_text_encoders_that_the_file_lacks_start_anew(new_run: Run, files: dict[str, Path], tiny_model: Path) -> None:
    adapter = {**TEXT, "init_from": str(files["lora kohya"])}
    session = prepare(new_run("text fresh", adapter=adapter), None, None)
    assert [g.name for g in session.groups] == ["unet", "text_encoder", "text_encoder_2"]
    plain = torch.cat(
        [e["prompt_embeds"] for e in SDXL.encode_prompts(SDXL.load(ModelConfig(path=str(tiny_model))), PROMPTS)]
    )
    assert torch.equal(encoded(session.model, base=False), plain)
    for parameter in session.groups[1].parameters.values():
        parameter.data += 0.1
    assert not torch.allclose(encoded(session.model, base=False), plain, atol=1e-2)
    assert torch.equal(encoded(session.model, base=True), plain)


WRONG = [
    ("dora kohya", {}, "is of the kind dora, and adapter.type is lora"),
    ("lora kohya", {"type": "loha"}, "is of the kind lora, and adapter.type is loha"),
]


@pytest.mark.parametrize(("which", "adapter", "message"), WRONG)
def test_another_kind_is_an_error(
    new_run: Run, files: dict[str, Path], which: str, adapter: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(new_run("wrong", adapter={"init_from": str(files[which]), **adapter}), None, None)


def test_a_missing_file_is_an_error(new_run: Run) -> None:
    with pytest.raises(ConfigError, match=r"init_from: there is no file .*nowhere"):
        prepare(new_run("missing", adapter={"init_from": "nowhere.safetensors"}), None, None)


@pytest.mark.parametrize("which", FILES)
def test_a_merged_file_predicts_as_the_loaded_one(files: dict[str, Path], tiny_model: Path, which: str) -> None:
    path = files[which]
    merged = SDXL.load(ModelConfig(path=str(tiny_model), merge_loras=(str(path),)))
    plain = SDXL.load(ModelConfig(path=str(tiny_model)))
    assert torch.allclose(_predict(merged, []), _predict(with_file(tiny_model, path), ["compare"]), atol=1e-5)
    assert not torch.allclose(_predict(merged, []), _predict(plain, []), atol=1e-3)
    none = SDXL.load(ModelConfig(path=str(tiny_model), merge_loras=(f"{path}=0.5", f"{path}=-0.5")))
    if which.startswith("lo"):  # linear in the strength
        assert torch.allclose(_predict(none, []), _predict(plain, []), atol=1e-4)
    assert merged.extras != plain.extras  # prompts of both must not share a cache


def test_a_merged_file_of_another_model_is_an_error(tiny_model: Path, tmp_path: Path) -> None:
    from tests.test_export import trained

    other = tmp_path / "other.safetensors"
    export_lora(trained("sd15", ("conv",)), FAMILIES["sd15"], other)
    with pytest.raises(ModelError, match="has no layer for lora_unet_down_blocks"):
        SDXL.load(ModelConfig(path=str(tiny_model), merge_loras=(str(other),)))


def test_a_smaller_rank_is_the_best_there_is(tiny_model: Path, tmp_path: Path) -> None:
    model = SDXL.load(ModelConfig(path=str(tiny_model)), encoders=False)
    add_lora(model, SDXL, AdapterConfig(rank=4, targets=("attention", "conv")), 0)
    draw = torch.Generator().manual_seed(5)
    for parameter in (p for p in model.unet.parameters() if p.requires_grad):
        parameter.data = 0.15 * torch.randn(parameter.shape, generator=draw)
    modules = live_modules(model)
    smaller, kept = resize(modules, 2)
    lost = whole = 0.0
    for before, after in zip(modules, smaller, strict=True):
        update = lora_update(before)
        values = torch.linalg.svdvals(update.double())
        apart = (update - lora_update(after)).square().sum().item()
        assert apart == pytest.approx(values[2:].square().sum().item(), rel=1e-3)  # Eckart-Young
        assert after.rank == 2
        lost, whole = lost + apart, whole + update.square().sum().item()
    assert kept == pytest.approx((1 - lost / whole) ** 0.5, rel=1e-4)
    assert resize(modules, 4)[1] == pytest.approx(1.0)

    path = tmp_path / "small.safetensors"
    report = export_lora(model, SDXL, path, rank=2)
    file = read_lora(path)
    assert set(file.ranks.values()) == {2}
    assert report.kept_norm == pytest.approx(kept)
    assert float(file.metadata["mapo.kept_norm"]) == pytest.approx(kept, abs=1e-4)
    assert [n for n in model.unet.peft_config] == ["default"]  # type: ignore[union-attr]  # the model is as before
    assert all(m.rank == 4 for m in live_modules(model))


def test_a_run_is_exported_at_another_rank(new_run: Run) -> None:
    run = new_run("resized", training={"steps": 1}, export={"rank": 2})
    run_here(run)
    assert set(read_lora(run.export / "resized.safetensors").ranks.values()) == {2}
    path = export_run(run, rank=1)
    assert set(read_lora(path).ranks.values()) == {1}
    assert "rank1" in path.name
