"""From what a person asks for to a run folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mapo_core import (
    GOALS,
    ConfigError,
    PairsError,
    build_config,
    demo_values,
    find_models,
    load_settings,
    pairs_from,
    request_run,
    settings_text,
)
from mapo_core.families._locate import DEMO_MODEL
from mapo_core.pairs import PairSet, list_sets, read_pairs, write_pairs

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two folders of pictures that differ from pair to pair."""
    for side, level in (("Chosen", 200), ("rejected", 60)):
        (tmp_path / "data" / side).mkdir(parents=True)
        for i in range(6):
            picture = Image.radial_gradient("L").rotate(15 * i).resize((64, 64)).convert("RGB")
            picture.paste((level, 10 * i, 40), (4 * i, 8, 4 * i + 20, 40))
            picture.save(tmp_path / "data" / side / f"{i}.png")
            (tmp_path / "data" / side / f"{i}.txt").write_text(f"a square number {i}")
    return tmp_path / "data"


def test_pairs_from_every_source(folders: Path, tmp_path: Path) -> None:
    found = pairs_from(folders, tmp_path)
    assert len(found.pairs) == 6
    write_pairs(tmp_path / "list.jsonl", found.pairs)
    assert len(pairs_from(tmp_path / "list.jsonl", tmp_path).pairs) == 6
    assert list_sets(tmp_path) == {}
    (tmp_path / "sets" / "mine").mkdir(parents=True)
    shutil.copy(tmp_path / "list.jsonl", tmp_path / "sets" / "mine" / "pairs.jsonl")
    assert list_sets(tmp_path) == {"mine": 6}
    assert len(pairs_from("mine", tmp_path).pairs) == 6
    assert len(pairs_from(tmp_path / "sets" / "mine", tmp_path).pairs) == 6
    with pytest.raises(PairsError, match=r"no pairs 'yours'.*mine"):
        pairs_from("yours", tmp_path)
    with pytest.raises(PairsError, match="chosen and rejected"):
        pairs_from(folders / "Chosen", tmp_path)


def test_a_request_becomes_a_run(folders: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    values = demo_values("mine")
    run, report = request_run(values, pairs_from(folders, tmp_path), tmp_path, lambda *done: seen.append(done))
    assert run.path == tmp_path / "runs" / "mine"
    assert len(read_pairs(run.pairs)) == 6
    assert build_config(load_settings(run.config)).training.steps == 400
    assert report.errors == ()
    assert seen
    assert not run.events.exists()


def test_what_is_wrong_is_said_before_there_is_a_run(folders: Path, tmp_path: Path) -> None:
    found = pairs_from(folders, tmp_path)
    with pytest.raises(ConfigError, match="steps"):
        request_run({**demo_values("x"), "training": {"steps": 0}}, found, tmp_path)
    with pytest.raises(PairsError, match="no pairs"):
        request_run(demo_values("x"), PairSet([]), tmp_path)
    found.pairs[0].rejected.unlink()
    with pytest.raises(PairsError, match="nothing was started") as said:
        request_run(demo_values("x"), found, tmp_path)
    assert said.value.problems
    assert not (tmp_path / "runs").exists()


def test_settings_go_to_yaml_and_back(tmp_path: Path) -> None:
    values = demo_values("größer")
    (tmp_path / "s.yaml").write_text(settings_text(values), encoding="utf-8")
    assert load_settings(tmp_path / "s.yaml") == yaml.safe_load(settings_text(values)) == values


def test_models_are_found_by_what_they_are(tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "models" / "family" / "small")
    (tmp_path / "models" / "broken.safetensors").write_bytes(b"no header")
    (tmp_path / "models" / "notes.txt").write_text("x")
    assert find_models([tmp_path / "models", tmp_path / "missing"]) == [tmp_path / "models" / "family" / "small"]


def test_goals_are_the_published_table() -> None:
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    table = re.search(r"Table 4\): (.+?)\. ", text.replace("\n", " "))
    assert table
    published = {name: float(number) for name, number in re.findall(r"([a-z ]+?) (\d+)", table[1])}
    names = {"person or object": "personalisation"}
    assert {names.get(goal.name, goal.name): goal.beta for goal in GOALS} == {
        name.strip(): beta for name, beta in published.items()
    }
    for goal in GOALS:
        build_config({"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p"}, **goal.settings()})
