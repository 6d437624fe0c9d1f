"""Train LoRA: which run it takes, and what it gives, with a trainer that only writes what a trainer would."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mapo_core import ConfigError, RunError, TrainingError, build_config
from mapo_core.pairs import PairSet, pairs_from_folders
from mapo_core.runs import EventWriter, RunDir, acquire_run_lock, list_runs, run_status

DEMO = "demo (built in)"


def request(**settings: Any) -> Any:
    values = {"name": "ink", "model": {"path": "demo"}, "data": {"pairs": "pairs.jsonl"}, **settings}
    return build_config(values)


@pytest.fixture
def pairs(folders: tuple[Path, Path]) -> PairSet:
    return pairs_from_folders(*folders)


def end(run: RunDir, how: str, lora: bool = True, step: int = 4) -> None:
    """What a trainer leaves behind."""
    with EventWriter(run) as events:
        events.emit("run_started", 0, steps=4, pid=1, process_started=0.0)
        events.emit("step", step, loss=0.5, chosen_mse=0.1, rejected_mse=0.3)
        events.emit(how, step)  # type: ignore[arg-type]
    if lora:
        run.export.mkdir(exist_ok=True)
        save_file({"a.lora_up.weight": torch.zeros(1)}, run.export / f"{run.name}.safetensors")


def test_a_finished_run_is_reused(pack: Any, pairs: PairSet) -> None:
    find = pack.module("train").find_or_create
    first = find(request(), pairs, "go on")
    end(first, "run_finished")
    assert find(request(), pairs, "go on").path == first.path
    assert find(request(), pairs, "begin anew").path == first.path
    assert len(list_runs()) == 1


def test_a_finished_run_whose_lora_is_gone_is_made_anew(pack: Any, pairs: PairSet) -> None:
    find = pack.module("train").find_or_create
    first = find(request(), pairs, "go on")
    end(first, "run_finished", lora=False)
    assert find(request(), pairs, "go on").path != first.path


@pytest.mark.parametrize("change", ["setting", "image", "prompt"])
def test_another_request_is_another_run_with_a_number(
    pack: Any, pairs: PairSet, folders: tuple[Path, Path], change: str
) -> None:
    find = pack.module("train").find_or_create
    first = find(request(), pairs, "go on")
    end(first, "run_finished")
    config = request()
    if change == "setting":
        config = request(seed=1)
    elif change == "image":
        os.utime(folders[0] / "cat.png", ns=(1, 1))
    else:
        (folders[0] / "cat.txt").write_text("another cat", encoding="utf-8")
        pairs = pairs_from_folders(*folders)
    second = find(config, pairs, "go on")
    assert (first.name, second.name) == ("ink", "ink-2")
    assert json.loads(second.config.read_text(encoding="utf-8"))["name"] in ("ink", "ink-2")


@pytest.mark.parametrize("state", ["run_stopped", "run_failed"])
def test_a_stopped_run_is_gone_on_with_only_if_asked(pack: Any, pairs: PairSet, state: str) -> None:
    find = pack.module("train").find_or_create
    first = find(request(), pairs, "go on")
    end(first, state, step=2)
    assert find(request(), pairs, "go on").path == first.path
    assert find(request(), pairs, "begin anew").path != first.path


def test_the_finished_one_of_several_is_taken(pack: Any, pairs: PairSet) -> None:
    find = pack.module("train").find_or_create
    first = find(request(), pairs, "go on")
    end(first, "run_finished")
    (first.path / "request.json").rename(first.path / "aside")
    second = find(request(), pairs, "go on")
    end(second, "run_stopped", step=2)
    (first.path / "aside").rename(first.path / "request.json")
    assert find(request(), pairs, "go on").path == first.path


def test_no_pairs_no_run(pack: Any) -> None:
    with pytest.raises(ConfigError, match="no pairs"):
        pack.module("train").find_or_create(request(), PairSet([]), "go on")
    assert list_runs() == []


def test_the_node_runs_again_when_what_it_gave_is_no_longer_so(
    pack: Any, pairs: PairSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, module = pack.node("MaPOTrainLoRA"), pack.module("train")
    given = {"checkpoint": DEMO, "name": "ink", "seed": 0, "if_stopped": "go on"}
    monkeypatch.setattr(module, "train_in_node", lambda run, *_: end(run, "run_stopped", step=2))
    assert node.fingerprint_inputs(**given) == 0
    stopped = pack.run("MaPOTrainLoRA", pairs=pairs, **given).args[2]
    first = node.fingerprint_inputs(**given)
    assert first == 1, "a stopped training is to be gone on with"
    assert node.fingerprint_inputs(**given) == first, "until it has run"
    monkeypatch.setattr(module, "train_in_node", lambda run, *_: end(run, "run_finished"))
    assert pack.run("MaPOTrainLoRA", pairs=pairs, **given).args[2] == stopped
    assert node.fingerprint_inputs(**given) == first, "a finished one stays in the cache"
    assert node.fingerprint_inputs(**{**given, "name": "other"}) == 0
    shutil.rmtree(stopped.path)
    assert node.fingerprint_inputs(**given) == first + 1, "a deleted one does not"


def test_a_stopped_lora_can_be_used_as_it_is(pack: Any, pairs: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    node, module, started = pack.node("MaPOTrainLoRA"), pack.module("train"), []

    def train(run: RunDir, *_: Any) -> None:
        started.append(run.name)
        end(run, "run_stopped", step=2)

    monkeypatch.setattr(module, "train_in_node", train)
    given = {"checkpoint": DEMO, "name": "ink", "seed": 0, "if_stopped": "use what is there"}
    name = pack.run("MaPOTrainLoRA", pairs=pairs, **given).args[0]
    assert Path(name) == Path("mapo/ink-00000002.safetensors")
    assert pack.run("MaPOTrainLoRA", pairs=pairs, **given).args[0] == name
    assert started == ["ink"]
    assert node.fingerprint_inputs(**given) == 0


def test_a_second_training_at_once_is_refused(pack: Any, pairs: PairSet) -> None:
    find = pack.module("train").find_or_create
    other = find(request(seed=5), pairs, "go on")
    with acquire_run_lock(other), pytest.raises(RunError, match=f"Run {other.name} is being trained"):
        pack.run("MaPOTrainLoRA", pairs=pairs, name="wash")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "a/b"}, "cannot be a file name"),
        ({"name": ""}, "cannot be a file name"),
        ({"checkpoint": "gone.safetensors"}, "no checkpoint 'gone.safetensors' any more"),
    ],
)
def test_wrong_inputs_are_said_before_anything_runs(pack: Any, given: dict[str, str], message: str) -> None:
    assert message in pack.node("MaPOTrainLoRA").validate_inputs(**given)


def test_right_and_linked_inputs_pass(pack: Any) -> None:
    node = pack.node("MaPOTrainLoRA")
    assert node.validate_inputs(checkpoint=DEMO, name="my style") is True
    assert node.validate_inputs() is True


def test_a_broken_checkpoint_is_said_before_anything_runs(pack: Any) -> None:
    broken = pack.comfy.base / "models" / "checkpoints" / "broken.safetensors"
    broken.write_bytes(b"nothing")
    assert "broken.safetensors" in pack.node("MaPOTrainLoRA").validate_inputs(checkpoint="broken.safetensors")


def test_what_it_gives(pack: Any, pairs: PairSet, monkeypatch: pytest.MonkeyPatch) -> None:
    module, started = pack.module("train"), []

    def train(run: RunDir, node_id: str, steps: int) -> None:
        started.append((run.name, node_id, steps))
        end(run, "run_finished")

    monkeypatch.setattr(module, "train_in_node", train)
    given = {"pairs": pairs, "name": "ink", "settings": {"training": {"steps": 4}}}
    out = pack.run("MaPOTrainLoRA", **given)
    name, lora, run, chart, samples = out.args
    assert started == [("ink", "7", 4)]
    assert pack.comfy.unloaded == 1
    assert (pack.comfy.base / "models" / "loras" / name).is_file()
    assert list(lora) == ["a.lora_up.weight"]
    assert run_status(run).state == "finished"
    assert chart.shape[-1] == samples.shape[-1] == 3
    assert out.ui["mapo_run"] == ["ink"]
    assert all(isinstance(value, list) for value in out.ui.values())

    again = pack.run("MaPOTrainLoRA", **given)
    assert len(started) == 1
    assert again.args[0] == name
    assert pack.comfy.unloaded == 1, "nothing is unloaded for a run that is finished"


def test_cancel_keeps_the_lora_and_one_without_a_step_says_so(
    pack: Any, pairs: PairSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = pack.module("train")

    class Cancelled(Exception):
        pass

    def cancelled(run: RunDir, node_id: str, steps: int) -> None:
        end(run, "run_stopped", step=2)
        raise Cancelled

    monkeypatch.setattr(module, "train_in_node", cancelled)
    with pytest.raises(Cancelled):
        pack.run("MaPOTrainLoRA", pairs=pairs, name="ink")
    assert (pack.comfy.base / "models" / "loras" / "mapo" / "ink-00000002.safetensors").is_file()

    monkeypatch.setattr(module, "train_in_node", lambda run, *_: end(run, "run_stopped", lora=False, step=0))
    with pytest.raises(TrainingError, match="stopped before its first step"):
        pack.run("MaPOTrainLoRA", pairs=pairs, name="wash", seed=1)
