"""The card of a LoRA, copies of it, and the pictures that lie in a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mapo_core import build_config, copy_lora, find_lora_copy, model_card, run_comparisons, save_model_card
from mapo_core.comparisons import write_index
from mapo_core.errors import ExportError, RunError
from mapo_core.pairs import PreferencePair, pairs_text
from mapo_core.runs import EventWriter, RunDir, create_run

PAIR = {"chosen": Path("/pictures/a.png"), "rejected": Path("/pictures/b.png")}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    values = {
        "name": "my style",
        "model": {"path": "someone/some-model"},
        "data": {"pairs": "p"},
        "export": {"trigger": "mystyle"},
        "optimizer": {"learning_rate": 0.002},
    }
    pairs = [PreferencePair(prompt=f"a star {i}", source="stem; prompt from a.txt", **PAIR) for i in range(5)]
    return create_run("my style", build_config(values).to_json(), pairs_text(pairs), tmp_path)


def test_the_card_says_what_the_lora_is_made_of(run: RunDir) -> None:
    with pytest.raises(RunError, match="no checkpoint"):
        model_card(run)
    run.checkpoint_path(200).mkdir()
    with EventWriter(run) as events:
        events.emit("phase", 0, phase="ready", held_out_pairs=2)
        measures = {"accuracy": 0.75, "margin": 0.0123}
        events.emit("evaluated", 200, **measures, base={"accuracy": 0.5, "margin": 0.001})
        events.emit("evaluated", 300, accuracy=0.99, margin=9.0, base={"accuracy": 0.5, "margin": 0.001})
    text = model_card(run)
    assert text.startswith("---\nbase_model: someone/some-model\n")
    for words in ("5 pairs, 2 of them held out", "`mystyle`", "optimizer.learning_rate = 0.002", "200 steps"):
        assert words in text
    assert "| accuracy | 0.5000 | 0.7500 |" in text
    assert "0.99" not in text  # of another step
    assert "/pictures" not in text  # nobody else's business
    assert "Nothing is granted" in text
    assert "Nothing is granted" not in model_card(run, licence="CC0")
    assert "Not measured." in model_card(run, 100)


def test_the_card_takes_the_evaluation_of_its_own_step(run: RunDir) -> None:
    run.checkpoint_path(200).mkdir()
    one = {"value": 0.8, "low": 0.7, "high": 0.9}
    held = {"accuracy_base": {**one, "value": 0.4}, "accuracy": one}
    score = {"title": "PickScore", "base": one, "lora": one, "win_rate": {**one, "value": 0.66}}
    report = {"held_out": held, "scores": [score], "drift": {"relative": 0.31}, "prompts": ["x"], "seeds": 2}
    folder = run.evaluation / "step_00000200"
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({**report, "prompts_from": "given"}))
    text = model_card(run)
    assert "| held-out pair accuracy | 0.400 [0.700, 0.900] | 0.800 [0.700, 0.900] |" in text
    assert "0.660" in text
    assert "0.31 of the base" in text


def test_a_card_that_someone_wrote_is_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("by hand", encoding="utf-8")
    first = save_model_card(tmp_path, "a card")
    assert first.name == "README-2.md"
    assert save_model_card(tmp_path, "a card") == first
    assert save_model_card(tmp_path, "another card").name == "README-3.md"
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "by hand"


def test_a_copy_replaces_nothing(tmp_path: Path) -> None:
    lora, folder = tmp_path / "a.safetensors", tmp_path / "loras" / "new"
    lora.write_bytes(b"one")
    first = copy_lora(lora, folder)
    assert copy_lora(lora, folder) == first == find_lora_copy(lora, folder)
    lora.write_bytes(b"two")
    assert find_lora_copy(lora, folder) is None
    second = copy_lora(lora, folder)
    assert (first.read_bytes(), second.read_bytes(), second.name) == (b"one", b"two", "a-2.safetensors")
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    with pytest.raises(ExportError, match="no LoRA file"):
        copy_lora(tmp_path / "none.safetensors", folder)
    with pytest.raises(ExportError, match="Choose another folder"):
        copy_lora(lora, lora / "inside a file")


def test_pictures_are_found_with_their_prompts(run: RunDir) -> None:
    def draw(folder: Path, count: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (8, 8)).save(folder / f"{i:02d}.png")

    draw(run.samples / "base", 2)
    draw(run.samples / "step_00000100", 2)
    draw(run.samples / "step_00000200", 1)  # cut off: one of two is missing
    with EventWriter(run) as events:
        for step in (100, 200):
            events.emit("sample_saved", step, path=f"samples/step_{step:08d}.png", prompts=["a", "b"])
    assert [(c.title, c.prompts) for c in run_comparisons(run)] == [("while training, step 100", ("a", "b"))]
    folder = run.samples / "compare_00000100"
    draw(folder / "row_00", 1)
    draw(folder / "row_01", 1)
    write_index(folder, "drawn", ["c"], [("base", "row_00"), ("strength 1", "row_01")], folder.with_suffix(".png"))
    found = run_comparisons(run)
    assert [c.title for c in found] == ["drawn", "while training, step 100"]
    assert found[0].rows[1] == ("strength 1", (folder / "row_01" / "00.png",))
    (folder / "pictures.json").write_text('{"rows": 3}')
    assert len(run_comparisons(run)) == 1
