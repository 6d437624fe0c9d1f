"""The nodes that make and change sets of pairs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mapo_core import ConfigError, MapoError, PairsError
from scripts.comfy_stand_in import InterruptProcessingException


def test_folders_become_pairs_with_sheet_and_report(pack: Any, folders: tuple[Path, Path]) -> None:
    out = pack.run("MaPOPairsFromFolders", chosen=str(folders[0]), rejected=str(folders[1]), trigger="inkstyle")
    pairs, report = out.args
    assert [p.prompt for p in pairs.pairs] == ["inkstyle, a cat", "inkstyle, a dog", "inkstyle, a owl"]
    assert out.ui["mapo_text"] == [report]
    assert "low-resolution" in report
    assert len(out.ui["images"]) == 1
    assert out.ui["images"][0].shape[-1] == 3


def test_files_are_noticed_when_they_change(pack: Any, folders: tuple[Path, Path]) -> None:
    node = pack.node("MaPOPairsFromFolders")
    given = {"chosen": str(folders[0]), "rejected": str(folders[1]), "match": "order"}
    before = node.fingerprint_inputs(**given)
    assert node.fingerprint_inputs(**given) == before
    (folders[0] / "cat.txt").write_text("an old cat", encoding="utf-8")
    assert node.fingerprint_inputs(**given) != before


@pytest.mark.parametrize("node_id", ["MaPOPairsFromFolders", "MaPOGenerateRejected"])
def test_a_missing_folder_is_said_before_anything_runs(pack: Any, node_id: str) -> None:
    node = pack.node(node_id)
    assert "does not exist" in node.validate_inputs(chosen="nowhere")
    linked = {i.id: None for i in node.GET_SCHEMA().inputs if i.id in ("chosen", "rejected")}
    assert node.validate_inputs(**linked) is True, "a linked name is known only when it runs"


def test_an_empty_folder(pack: Any, folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PairsError, match="empty"):
        pack.run("MaPOPairsFromFolders", chosen=str(folders[0]), rejected=str(tmp_path / "empty"))


def test_errors_of_the_check_stop_the_workflow(pack: Any, folders: tuple[Path, Path]) -> None:
    (folders[1] / "dog.png").write_bytes((folders[1] / "dog.png").read_bytes()[:100])
    with pytest.raises(MapoError, match=r"dog\.png"):
        pack.run("MaPOPairsFromFolders", chosen=str(folders[0]), rejected=str(folders[1]))


def test_cancel_is_heard_during_the_check(pack: Any, folders: tuple[Path, Path]) -> None:
    pack.comfy.cancelled = True
    with pytest.raises(InterruptProcessingException):
        pack.run("MaPOPairsFromFolders", chosen=str(folders[0]), rejected=str(folders[1]))


def test_images_are_added_to_a_set_once(pack: Any) -> None:
    good, bad = torch.rand(2, 16, 24, 3), torch.rand(2, 16, 24, 3)
    given = {"chosen": good, "rejected": bad, "prompts": "a cat\na dog", "set_name": "mine"}
    first = pack.run("MaPOPairsFromImages", **given)
    assert first.args[1].startswith("2 pairs added, 2 in the set.")
    assert [p.prompt for p in first.args[0].pairs] == ["a cat", "a dog"]
    again = pack.run("MaPOPairsFromImages", **given)
    assert again.args[1].startswith("0 pairs added, 2 in the set.")
    more = pack.run("MaPOPairsFromImages", **{**given, "prompts": "one prompt"})
    assert more.args[1].startswith("2 pairs added, 4 in the set.")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": ""}, "0 prompts for 2 pairs"),
        ({"prompts": "a\nb\nc"}, "3 prompts for 2 pairs"),
        ({"rejected": torch.zeros(1, 8, 8, 3)}, "2 chosen and 1 rejected"),
        ({"set_name": "../up"}, "Name of the set"),
    ],
)
def test_images_that_do_not_make_pairs(pack: Any, given: dict[str, Any], message: str) -> None:
    images = torch.zeros(2, 8, 8, 3)
    with pytest.raises(PairsError, match=message):
        pack.run("MaPOPairsFromImages", **{"chosen": images, "rejected": images, "prompts": "a", **given})


@pytest.fixture
def found(pack: Any, folders: tuple[Path, Path]) -> Any:
    return pack.run("MaPOPairsFromFolders", chosen=str(folders[0]), rejected=str(folders[1])).args[0]


def test_join_takes_a_pair_once(pack: Any, found: Any) -> None:
    out = pack.run("MaPOJoinPairs", pairs_1=found, pairs_2=found, pairs_4=None)
    assert len(out.args[0].pairs) == 3


def test_split_holds_out_a_share(pack: Any, found: Any) -> None:
    rest, held = pack.run("MaPOSplitPairs", pairs=found, share=0.34, seed=1).args
    assert (len(rest.pairs), len(held.pairs)) == (2, 1)
    assert {*rest.pairs} | {*held.pairs} == {*found.pairs}
    others = {pack.run("MaPOSplitPairs", pairs=found, share=0.34, seed=s).args[1].pairs[0] for s in range(12)}
    assert len(others) == 3


def test_filter_drops_by_finding(pack: Any, folders: tuple[Path, Path]) -> None:
    shutil.copy(folders[0] / "cat.png", folders[0] / "dog.png")
    shutil.copy(folders[1] / "cat.png", folders[1] / "dog.png")
    found = pack.run("MaPOPairsFromFolders", chosen=str(folders[0]), rejected=str(folders[1])).args[0]
    kept, dropped, report = pack.run("MaPOFilterPairs", pairs=found, check_resolution=64).args
    assert [p.chosen.stem for p in kept.pairs] == ["cat", "owl"]
    assert [p.chosen.stem for p in dropped.pairs] == ["dog"]
    assert report.startswith("2 of 3 pairs kept, 1 dropped.")
    assert (folders[0] / "dog.png").exists()
    with pytest.raises(ConfigError, match="All 3 pairs would be dropped"):
        pack.run("MaPOFilterPairs", pairs=found, drop_low_resolution=True, check_resolution=4096)


def test_drops_are_findings_that_exist(pack: Any) -> None:
    from mapo_core.pairs import TITLES

    codes = {code for group in pack.module("pair_sets").DROPS.values() for code in group}
    assert codes <= set(TITLES)


def test_rejected_images_by_the_wired_model(pack: Any, folders: tuple[Path, Path], monkeypatch: Any) -> None:
    drawn: list[tuple[str, int, tuple[int, int]]] = []

    def sample(model: Any, clip: Any, vae: Any, prompt: str, negative: str, seed: int, size: Any, *rest: Any) -> Any:
        drawn.append((prompt, seed, size))
        return Image.effect_noise(size, 90).convert("RGB")

    monkeypatch.setattr(pack.module("_comfy"), "sample", sample)
    monkeypatch.setattr(pack.module("_comfy"), "model_identity", lambda *parts: "m")
    given = {"chosen": str(folders[0]), "settings": {"data": {"resolution": 64}}}
    parts = {"model": object(), "clip": object(), "vae": object()}
    first = pack.run("MaPOGenerateRejected", **given, **parts)
    assert [p for p, _, _ in drawn] == ["a cat", "a dog", "a owl"]
    assert len({seed for _, seed, _ in drawn}) == 3
    assert all(w > h for _, _, (w, h) in drawn), "the shape of the chosen image"
    again = pack.run("MaPOGenerateRejected", **given, **parts)
    assert len(drawn) == 3, "what is there is not drawn again"
    assert again.args[0].pairs == first.args[0].pairs
    pack.run("MaPOGenerateRejected", **given, **parts, steps=7)
    assert len(drawn) == 6


def test_a_model_that_is_not_wired_is_named(pack: Any, folders: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="wire clip, vae in, or choose a checkpoint"):
        pack.run("MaPOGenerateRejected", chosen=str(folders[0]), model=object())


def test_the_demo_gives_pairs_and_settings(pack: Any) -> None:
    from mapo_core import build_config, merge_settings

    pairs, settings = pack.run("MaPODemoModel", steps=40).args
    assert len(pairs.pairs) == 160
    config = build_config(
        merge_settings(settings, {"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p.jsonl"}})
    )
    assert config.training.steps == 40
    assert config.validation.sample_every_steps == 10
