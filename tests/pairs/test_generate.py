"""Pairs made by a model: rejected images for chosen ones, both sides by prefixes, and lists of prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mapo_core import PairsError, build_config
from mapo_core.pairs import (
    Captioned,
    GenerationSettings,
    SynthesisSettings,
    generate_rejected,
    read_pair_set,
    read_prompts,
    synthesize_pairs,
)
from mapo_core.pairs.parquet import RowFilter, pairs_from_parquet
from mapo_core.pairs.synthesize import with_prefix

from ..training.conftest import drawn_pairs, tiny_model
from .test_parquet import rows, write

__all__ = ["drawn_pairs", "tiny_model"]


def config_for(tiny_model: Path) -> Any:
    data = {"pairs": "p", "resolution": 32, "bucket_step": 8}
    return build_config({"name": "x", "model": {"path": str(tiny_model)}, "data": data, "training": {"device": "cpu"}})


@pytest.fixture
def chosen(drawn_pairs: list[dict[str, str]]) -> list[Captioned]:
    return [Captioned(Path(r["chosen"]), r["prompt"], "by hand", "fixed prompt", r["prompt"]) for r in drawn_pairs[:4]]


class Rounds:
    """A stand-in embedder, asked in turn for chosen and generated images."""

    name = title = "rounds"

    def __init__(self) -> None:
        self.calls = 0

    def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
        self.calls += 1
        if self.calls % 2:  # the chosen images come first
            return torch.tensor([[1.0, 0.0]] * len(images))
        # every second generated image looks like its chosen one, in the first round only
        return torch.tensor([[1.0, 0.0] if i % 2 and self.calls == 2 else [0.0, 1.0] for i in range(len(images))])


SAMPLING = {"num_inference_steps": 1, "guidance_scale": 1.0}


def test_several_for_each_chosen_image_from_recorded_seeds(
    tiny_model: Path, chosen: list[Captioned], tmp_path: Path
) -> None:
    settings = GenerationSettings(**SAMPLING, per_image=2, seed=3)
    found = generate_rejected(config_for(tiny_model), chosen, tmp_path, settings)
    assert [p.chosen for p in found.pairs] == [c.image for c in chosen for _ in (0, 1)]
    assert len({p.rejected for p in found.pairs}) == 8
    assert found.findings == []
    records = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text(encoding="utf-8").splitlines()]
    by_file = {r["file"]: r for r in records}
    for pair in found.pairs:
        assert str(by_file[pair.rejected.name]["seed"]) in pair.source
        assert by_file[pair.rejected.name]["prompt"] == pair.prompt
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.png")}
    fewer = generate_rejected(config_for(tiny_model), chosen[2:], tmp_path, settings)
    assert [p.rejected for p in fewer.pairs] == [p.rejected for p in found.pairs[4:]]  # not the place in the folder
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.png")} == before


def test_too_similar_images_are_drawn_again_from_another_seed(
    tiny_model: Path, chosen: list[Captioned], tmp_path: Path
) -> None:
    settings = GenerationSettings(**SAMPLING, min_distance=0.5, attempts=3)
    seen: list[tuple[int, int]] = []
    found = generate_rejected(
        config_for(tiny_model),
        chosen,
        tmp_path,
        settings,
        embedder=Rounds(),
        progress=lambda *d: seen.append(d),
    )
    assert len(found.pairs) == 4
    assert len(list(tmp_path.glob("*.png"))) == 6  # two of four a second time
    assert seen[-1] == (6, 6)
    plain = generate_rejected(config_for(tiny_model), chosen, tmp_path, GenerationSettings(**SAMPLING))
    kept = [a.rejected == b.rejected for a, b in zip(found.pairs, plain.pairs, strict=True)]
    assert kept == [True, False, True, False]


def test_what_stays_too_similar_is_left_out_and_said(tiny_model: Path, chosen: list[Captioned], tmp_path: Path) -> None:
    class Half:
        name = title = "half"

        def __init__(self) -> None:
            self.calls = 0

        def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:  # generated, first round: the first is far, the others are not
                return torch.tensor([[0.0, 1.0]] + [[1.0, 0.0]] * (len(images) - 1))
            return torch.tensor([[1.0, 0.0]] * len(images))

    settings = GenerationSettings(**SAMPLING, min_distance=0.5, attempts=2)
    found = generate_rejected(config_for(tiny_model), chosen, tmp_path, settings, embedder=Half())
    assert [p.chosen for p in found.pairs] == [chosen[0].image]
    assert "3 of 4 pairs were left out" in found.findings[0].message

    class Same(Half):
        def embed(self, images: Sequence[Image.Image]) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0]] * len(images))

    with pytest.raises(PairsError, match="No generated image differs"):
        generate_rejected(config_for(tiny_model), chosen, tmp_path, settings, embedder=Same())
    with pytest.raises(PairsError, match="embedder is needed"):
        generate_rejected(config_for(tiny_model), chosen, tmp_path, settings)


PREFIXES = SynthesisSettings("a cartoon of", "", per_prompt=2, **SAMPLING)  # type: ignore[arg-type]


def test_both_sides_by_prefix_from_the_same_noise(tiny_model: Path, tmp_path: Path) -> None:
    found = synthesize_pairs(config_for(tiny_model), ["a star", "a boat", "a star"], tmp_path, PREFIXES)
    assert [p.prompt for p in found.pairs] == ["a star", "a star", "a boat", "a boat"]
    records = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text(encoding="utf-8").splitlines()]
    by_file = {r["file"]: r for r in records}
    assert len(by_file) == len(records) == 8
    for pair in found.pairs:
        one, two = by_file[pair.chosen.name], by_file[pair.rejected.name]
        assert one["prompt"] == f"a cartoon of {pair.prompt}"
        assert two["prompt"] == pair.prompt
        assert one["seed"] == two["seed"]
        assert pair.chosen.read_bytes() != pair.rejected.read_bytes()
    assert len({r["seed"] for r in records}) == 4
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.png")}
    next(iter(before)).unlink()
    again = synthesize_pairs(config_for(tiny_model), ["a star", "a boat"], tmp_path, PREFIXES)
    assert again.pairs == found.pairs
    assert sum(p.stat().st_mtime_ns != before[p] for p in before) == 1


def test_a_judge_leaves_out_what_is_not_better_and_judges_once(tiny_model: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    class Judge:
        name = title = "judge"

        def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
            asked.extend(prompts)
            points = {"a star": (5, 1), "a boat": (3, 2.5), "a fish": (2, 2), "a moon": (float("nan"), 1)}
            return [points[p.removeprefix("a cartoon of ")][i % 2] for i, p in enumerate(prompts)]

    def synthesize(margin: float) -> Any:
        settings = SynthesisSettings("a cartoon of", "", min_margin=margin, **SAMPLING)  # type: ignore[arg-type]
        prompts = ["a star", "a boat", "a fish", "a moon"]
        return synthesize_pairs(
            config_for(tiny_model), prompts, tmp_path, settings, load_judge=Judge, judge_name="judge"
        )

    found = synthesize(0.0)
    assert [p.prompt for p in found.pairs] == ["a star", "a boat"]  # equal scores are not better
    assert (found.pairs[0].chosen_score, found.pairs[0].rejected_score) == (5, 1)
    assert found.counts == {"synthesized": 2, "left out": 1, "not judged": 1}
    assert [f.code for f in found.findings] == ["judged", "not-judged"]
    assert all(p.startswith("a cartoon of") for p in asked)
    count = len(asked)
    assert [p.prompt for p in synthesize(1.0).pairs] == ["a star"]
    assert len(asked) == count
    with pytest.raises(PairsError, match="No pair is left"):
        synthesize(9.0)


def test_prefixes_may_have_a_place_for_the_prompt_and_must_differ(tiny_model: Path, tmp_path: Path) -> None:
    assert with_prefix("a star", "{prompt}, cartoon style") == "a star, cartoon style"
    assert with_prefix("a star", "a cartoon of") == "a cartoon of a star"
    assert with_prefix("a star", "") == "a star"
    settings = SynthesisSettings("a cartoon of", " a cartoon of  ")
    with pytest.raises(PairsError, match="the same"):
        synthesize_pairs(config_for(tiny_model), ["a star"], tmp_path, settings)
    with pytest.raises(PairsError, match="no prompt"):
        synthesize_pairs(config_for(tiny_model), [], tmp_path, SynthesisSettings("a", "b"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "# a comment\na  star\n\na boat\na star\n"),
        ("a.json", '["a star", "a boat"]'),
        ("a.json", '[{"prompt": "a star", "id": 3}, {"caption": "a boat"}]'),
        ("a.json", '{"anime": ["a star"], "photo": [{"text": "a boat"}]}'),
        ("a.jsonl", '{"prompt": "a star"}\n"a boat"\n'),
    ],
)
def test_lists_of_prompts(tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert read_prompts(path) == ["a star", "a boat"]


def test_lists_of_prompts_with_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('["a star", 3, {"id": 4}]', encoding="utf-8")
    with pytest.raises(PairsError, match=r"\[1\]: 3") as caught:
        read_prompts(path)
    assert len(caught.value.problems) == 2
    path.write_text("[", encoding="utf-8")
    with pytest.raises(PairsError, match="not valid JSON"):
        read_prompts(path)
    (tmp_path / "b.txt").write_text("\n# nothing\n", encoding="utf-8")
    with pytest.raises(PairsError, match="no prompts"):
        read_prompts(tmp_path / "b.txt")


def test_parquet_rows_by_label_size_and_number(tmp_path: Path) -> None:
    import io

    def sized(side: int) -> bytes:
        buffer = io.BytesIO()
        Image.effect_noise((side, 2 * side), 50).convert("RGB").save(buffer, "JPEG")
        return buffer.getvalue()

    records = rows(1.0, 0.0, 0.75, 0.5, 1.0, 1.0)
    for i, side in enumerate((64, 64, 64, 64, 16, 64)):
        records[i]["jpg_0"], records[i]["jpg_1"] = sized(side), sized(64)
    source = write(tmp_path / "a.parquet", records)

    def found(keep: RowFilter) -> tuple[list[str], dict[str, int]]:
        result = pairs_from_parquet(source, tmp_path / "out", keep=keep)
        return [p.source.split(";")[0].rpartition(" ")[2] for p in result.pairs], result.counts

    assert found(RowFilter())[0] == ["1", "2", "3", "5", "6"]
    clear, counts = found(RowFilter(min_margin=1.0))
    assert clear == ["1", "2", "5", "6"]
    assert counts["near tie"] == 1
    large, counts = found(RowFilter(min_side=32))
    assert large == ["1", "2", "3", "6"]
    assert counts["small"] == 1
    assert found(RowFilter(min_margin=0.5))[0] == ["1", "2", "3", "5", "6"]
    seen: list[tuple[int, int]] = []
    few = pairs_from_parquet(
        source, tmp_path / "few", keep=RowFilter(limit=2), progress=lambda *done: seen.append(done)
    )
    assert len(few.pairs) == 2
    assert seen == [(2, 6)]  # the other row groups were not read
    assert found(RowFilter(min_margin=1.0, min_side=32, limit=3))[0] == ["1", "2", "6"]


def test_filters_are_for_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "chosen": "b.png", "rejected": "c.png"}\n', encoding="utf-8")
    assert len(read_pair_set(tmp_path / "a.jsonl").pairs) == 1
    with pytest.raises(PairsError, match="parquet files only"):
        read_pair_set(tmp_path / "a.jsonl", keep=RowFilter(limit=1))


def test_generate_rejected_and_synthesize_on_the_command_line(
    tiny_model: Path, drawn_pairs: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import shutil

    from mapo_core.cli import main
    from mapo_core.pairs import read_pairs

    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    good = tmp_path / "gut ü"
    good.mkdir()
    for i, record in enumerate(drawn_pairs[:2]):
        shutil.copy(record["chosen"], good / f"{i}.png")
        (good / f"{i}.txt").write_text(record["prompt"], encoding="utf-8")
    settings = ["--model", str(tiny_model), "--training.device=cpu", "--data.resolution=32"]
    settings += ["--validation.num_inference_steps=1", "--seed", "5"]
    out, result = tmp_path / "made.jsonl", tmp_path / "made.json"
    command = ["pairs", "generate-rejected", *settings, "--chosen", str(good), "--per-image", "2", "--out", str(out)]
    assert main([*command, "--json", str(result)]) == 0
    pairs = read_pairs(out)
    assert [p.chosen.name for p in pairs] == ["0.png", "0.png", "1.png", "1.png"]
    assert "4 pairs in" in capsys.readouterr().out
    assert json.loads(result.read_text(encoding="utf-8"))["pairs"] == 4
    assert main(command) == 1
    assert "--overwrite" in capsys.readouterr().err

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a star\na boat\na fish\n", encoding="utf-8")
    both = tmp_path / "both.jsonl"
    command = ["pairs", "synthesize", *settings, "--prompts", str(prompts), "--limit", "2", "--out", str(both)]
    assert main([*command, "--chosen-prefix", "{prompt}, cartoon"]) == 0
    assert [p.prompt for p in read_pairs(both)] == ["a star", "a boat"]
    assert len(list((tmp_path / "both").glob("chosen-*.png"))) == 2
    capsys.readouterr()
    assert main([*command, "--overwrite", "--chosen-prefix", "x", "--min-margin", "1"]) == 1
    assert "--judge" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--chosen-prefix", "x", "--judge", "pickscore"]) == 1
    assert "hf download yuvalkirstain/PickScore_v1" in capsys.readouterr().err
    assert main(["pairs", "--chosen", str(good), "--rejected", str(good), "--limit", "3"]) == 1
    assert "are for parquet" in capsys.readouterr().err
