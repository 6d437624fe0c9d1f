"""Reference mismatch: the arithmetic by hand, the line to beta, and the measurement on models and folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mapo_core import ConfigError, ModelError, PairsError, build_config
from mapo_core.cli import main
from mapo_core.errors import MissingWeightsError
from mapo_core.evaluate import BETAS, betas_to_try, load_embedder, measure_mismatch, mismatch_of
from mapo_core.evaluate.mismatch import suggested_beta
from mapo_core.pairs import PreferencePair
from mapo_core.runs import JobStoppedError, run_job

NOTED: dict[str, Any] = {
    "embedder": "by hand",
    "model": "none",
    "seed": 0,
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
}


def unit(*rows: list[float]) -> np.ndarray:
    array = np.array(rows, dtype=np.float64)
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_the_measure_by_hand() -> None:
    """Two prompts, at right angles; the chosen images lie further off, in a direction of their own."""
    generated = unit([1, 0, 0], [0, 1, 0])
    chosen = unit([0.6, 0, 0.8], [0, 0.6, 0.8])
    found = mismatch_of(chosen, generated, generated, **NOTED)
    assert found.similarity.value == pytest.approx(0.6)
    assert found.same_prompt.value == pytest.approx(1)
    assert found.different_prompts is not None
    assert found.different_prompts.value == pytest.approx(0)
    assert found.mismatch is not None
    assert found.mismatch.value == pytest.approx(0.4)  # (1 - 0.6) / (1 - 0)
    assert found.beta == 64  # 2 ** (3 + 7 * 0.4) = 55.7
    assert json.loads(json.dumps(found.as_dict()))["mismatch"]["value"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("mismatch", "beta"),
    [
        (0, 8),
        (0.14, 8),
        (0.15, 32),
        (0.35, 32),
        (0.36, 64),
        (0.5, 64),
        (0.51, 128),
        (0.78, 128),
        (0.79, 1024),
        (1, 1024),
    ],
)
def test_the_line_from_mismatch_to_beta(mismatch: float, beta: int) -> None:
    assert suggested_beta(mismatch) == beta


def test_three_values_are_offered_with_the_suggested_one_among_them() -> None:
    assert [betas_to_try(b) for b in BETAS] == [
        (8, 32, 64),
        (8, 32, 64),
        (32, 64, 128),
        (64, 128, 1024),
        (64, 128, 1024),
    ]


def test_mismatch_stays_between_0_and_1() -> None:
    generated = unit([1, 0.1, 0], [0.1, 1, 0])
    again = unit([1, 0.3, 0], [0.3, 1, 0])
    nearer = mismatch_of(generated, generated, again, **NOTED)
    assert nearer.mismatch is not None
    assert nearer.mismatch.value == 0
    opposite = mismatch_of(-generated, generated, again, **NOTED)
    assert opposite.mismatch is not None
    assert opposite.mismatch.value == opposite.mismatch.high == 1
    assert opposite.close_to_sft
    assert "close to SFT" in opposite.render()


def test_not_measurable_is_said_and_suggests_nothing() -> None:
    same = unit([1, 0], [1, 0.01], [1, 0.02])
    found = mismatch_of(same, same, same, **NOTED)
    assert found.mismatch is None
    assert (found.beta, found.betas) == (None, ())
    assert "Not measurable here: two pictures of one prompt are as alike" in found.render()
    one = mismatch_of(same[:1], same[:1], same[:1], **NOTED)
    assert "same prompt" in one.reason
    assert "Not measurable here" in one.render()


def test_the_interval_holds_the_value_narrows_with_prompts_and_is_repeatable() -> None:
    rng = np.random.default_rng(0)

    def measured(n: int) -> Any:
        base = rng.normal(size=(n, 64))
        noise = [rng.normal(size=(n, 64)) for _ in range(3)]
        chosen = base + 1.5 * noise[0] * rng.uniform(0.2, 1.8, size=(n, 1))
        arrays = [unit(*a.tolist()) for a in (chosen, base + 0.3 * noise[1], base + 0.3 * noise[2])]
        found = mismatch_of(*arrays, **NOTED)
        assert found == mismatch_of(*arrays, **NOTED)
        return found.mismatch

    few, many = measured(8), measured(128)
    for interval in (few, many):
        assert interval.low < interval.value < interval.high
    assert many.high - many.low < (few.high - few.low) / 2


def test_the_heuristic_is_labelled() -> None:
    generated = unit([1, 0, 0], [0, 1, 0])
    text = mismatch_of(generated, generated, generated, **NOTED).render()
    assert "heuristic, not a fit" in text
    assert "published for SDXL" in text
    assert "8, 32, 64" in text


def tiny_config(tiny_model: Path, **groups: Any) -> Any:
    data = {"pairs": "p", "resolution": 32, "bucket_step": 8}
    return build_config(
        {"name": "x", "model": {"path": str(tiny_model)}, "data": data, "training": {"device": "cpu"}, **groups}
    )


class Colours:
    """A stand-in embedder: mean colour and its spread."""

    name = title = "colours"

    def embed(self, images: list[Image.Image]) -> torch.Tensor:
        arrays = np.stack([np.asarray(im.resize((8, 8)), dtype=np.float32) for im in images])
        flat = torch.from_numpy(arrays).flatten(1) / 127.5 - 1
        return torch.nn.functional.normalize(flat, dim=1)


def test_pictures_are_kept_and_only_missing_ones_drawn_again(
    tiny_model: Path, drawn_pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    pairs = [PreferencePair.model_validate(r) for r in drawn_pairs]
    seen: list[tuple[int, int]] = []

    def measure() -> Any:
        return measure_mismatch(
            tiny_config(tiny_model),
            pairs,
            Colours(),
            count=5,
            num_inference_steps=1,
            folder=tmp_path / "kept",
            progress=lambda done, total: seen.append((done, total)),
        )

    first, pictures = measure()
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").glob("*.png")}
    assert len(files) == 10
    assert first.prompts == len(pictures.prompts) == 5
    assert seen[0] == (0, 25)
    assert seen[-1] == (25, 25)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    for size, two in zip(pictures.sizes, pictures.generated, strict=True):
        assert Image.open(two[0]).size == Image.open(two[1]).size == size
        assert two[0].read_bytes() != two[1].read_bytes()
    next(iter(files)).unlink()
    again, _ = measure()
    assert again == first
    now = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").glob("*.png")}
    assert sum(now[p] != files[p] for p in files) == 1


def test_an_empty_set_is_an_error(tiny_model: Path) -> None:
    with pytest.raises(PairsError, match="no pair"):
        measure_mismatch(tiny_config(tiny_model), [], Colours())


def test_embedders_are_chosen_by_model_and_missing_weights_say_what_to_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    assert load_embedder("auto", "demo").name == "demo"
    with pytest.raises(ConfigError, match="demo model's pictures alone"):
        load_embedder("demo", "sdxl.safetensors")
    with pytest.raises(MissingWeightsError) as caught:
        load_embedder("auto", "sdxl.safetensors")
    message = str(caught.value)
    assert "hf download facebook/dinov2-base" in message
    assert str(tmp_path / "home" / "models" / "dinov2") in message
    with pytest.raises(MissingWeightsError, match=r"lacks .*safetensors"):
        load_embedder("dinov2", "demo", folder=tmp_path)
    assert isinstance(caught.value, ModelError)


def test_the_demo_embedding_tells_styles_and_objects_apart() -> None:
    import itertools

    from mapo_core.demo.scenes import render, scenes

    embedder = load_embedder("auto", "demo")
    drawn = list(itertools.islice(scenes(11, held_out=False), 12))
    plain, cartoon, neon = (embedder.embed([render(s, style) for s in drawn]) for style in ("plain", "cartoon", "neon"))
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(12))
    other = (plain @ plain.T - torch.eye(12)).sum() / (12 * 11)
    likeness = [(plain * x).sum(dim=1).mean() for x in (cartoon, neon)]
    assert other < likeness[1] < likeness[0] < 0.95


def test_mismatch_on_the_command_line_and_in_a_process_of_its_own(
    drawn_pairs: list[dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The demo model with neon pictures: real weights, few steps."""
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    listing = tmp_path / "pairs.jsonl"
    listing.write_text("".join(json.dumps(r) + "\n" for r in drawn_pairs), encoding="utf-8")
    command = ["mismatch", "--model", "demo", "--pairs", str(listing), "--count", "6"]
    command += ["--validation.num_inference_steps=4", "--training.device=cpu"]
    out, sheet = tmp_path / "m.json", tmp_path / "m.png"
    assert main([*command, "--json", str(out), "--sheet", str(sheet)]) == 0
    printed = capsys.readouterr().out
    assert "heuristic" in printed
    values = json.loads(out.read_text(encoding="utf-8"))
    assert values["beta"] in BETAS
    assert Image.open(sheet).size[0] > 6 * 64
    done: list[tuple[int, int]] = []
    phases: list[str] = []
    arguments = {
        "settings": {
            "name": "mismatch",
            "model": {"path": "demo"},
            "data": {"pairs": "pairs.jsonl"},
            "training": {"device": "cpu"},
        },
        "pairs": str(listing),
        "count": 6,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "embedder": "auto",
        "sheet": str(tmp_path / "child.png"),
    }

    def note(what: str, finished: int, total: int) -> None:
        phases.append(what)
        done.append((finished, total))

    child = run_job("mismatch", arguments, progress=note)
    assert child["mismatch"] == values
    assert done[-1] == (30, 30)
    assert list(dict.fromkeys(phases)) == ["drawing with the base model", "comparing pictures"]
    with pytest.raises(PairsError, match="no/such"):
        run_job("mismatch", {**arguments, "pairs": "/no/such.jsonl"})
    with pytest.raises(JobStoppedError):
        run_job("mismatch", arguments, should_stop=lambda: True)
