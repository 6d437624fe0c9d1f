"""The per-pair view, and going on without some pairs."""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any

import pytest
import torch

from mapo_core.continuation import START, continue_run, read_inspection
from mapo_core.demo.scenes import render, scenes
from mapo_core.errors import PairsError, RunError
from mapo_core.inspect_pairs import classify, inspect_run, mean_and_error
from mapo_core.pairs import read_pairs
from mapo_core.runs import RunDir, read_events
from mapo_core.session import prepare

from .conftest import Run, lora_of, run_here

WRONG = 3  # the pair whose images are swapped


@pytest.fixture(scope="module")
def cartoons(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Sixteen pairs, cartoon before plain; in one of them it is the other way round."""
    folder = tmp_path_factory.mktemp("cartoons")
    records: list[dict[str, Any]] = []
    for i, scene in enumerate(itertools.islice(scenes(7, held_out=False), 16)):
        record: dict[str, Any] = {"prompt": scene.caption, "held_out": i >= 12}
        styles = ("plain", "cartoon") if i == WRONG else ("cartoon", "plain")
        for side, style in zip(("chosen", "rejected"), styles, strict=True):
            record[side] = str(folder / f"{side}-{i}.png")
            render(scene, style, 64).save(record[side])
        records.append(record)
    return records


SETTINGS: dict[str, Any] = {
    "model": {"path": "demo"},
    "data": {"resolution": None, "bucket": False},
    "method": {"type": "mapo", "margin_weight": 0.1},
    "optimizer": {"learning_rate": 2e-3},
    "training": {"steps": 30, "train_batch_size": 4, "gradient_accumulation_steps": 1},
    "checkpoint": {"every_steps": 10},
    "export": {"precision": "fp32"},
}


@pytest.fixture
def new_cartoon_run(new_run: Run, cartoons: list[dict[str, Any]]) -> Run:
    return functools.partial(new_run, pairs=cartoons, **SETTINGS)


def test_a_mislabelled_pair_is_found(new_cartoon_run: Run) -> None:
    run = new_cartoon_run("mislabelled")
    run_here(run)
    found = inspect_run(run, draws=6, influence_pairs=12, influence_draws=4)
    assert found.steps == [0, 10, 20, 30]
    assert len(found.pairs) == found.all_pairs == 16
    wrong = next(p for p in found.pairs if p.index == WRONG)
    assert wrong.verdict in ("harmful", "resisted")
    assert found.pairs[0].index == WRONG  # the first to look at
    others = [p for p in found.pairs if p.index != WRONG]
    assert not any(p.verdict == "harmful" for p in others)
    assert wrong.gain < sorted(p.gain for p in others)[len(others) // 2]
    assert wrong.influence == min(p.influence for p in found.pairs if p.influence is not None)
    assert all(len(p.margin) == len(p.accuracy) == 4 for p in found.pairs)
    assert {p.index for p in found.pairs if p.held_out} == {12, 13, 14, 15}
    assert all(p.influence is None for p in found.pairs if p.held_out)
    stored = read_inspection(run)
    assert stored is not None
    assert stored["pairs"][0]["index"] == WRONG
    assert stored["sheet"].endswith("step_00000030.png")
    assert f"{WRONG}" in found.render(1)
    assert [e["step"] for e in read_events(run.events) if e["type"] == "step"] == list(range(1, 31))  # untouched

    # Going on without it, and with it turned round: nothing is encoded, and the held-out pairs stay the same.
    for name, change, pairs in (("without", {"exclude": [WRONG]}, 15), ("turned", {"flip": [WRONG]}, 16)):
        new = continue_run(run, name=name, settings={"training": {"steps": 2}}, **change)
        begin = prepare(new, None, None)
        assert begin.step == 0
        start = {k: v.clone() for k, v in lora_of(run).items()}
        from mapo_core.adapter import adapter_state

        assert all(torch.equal(start[k], v) for k, v in adapter_state(begin.model).items())
        assert begin.optimizer.state_dict()["state"]
        run_here(new)
        events = read_events(new.events)
        assert not [e for e in events if str(e.get("phase", "")).startswith("encoding")]
        assert events[-1]["type"] == "run_finished"
        config = json.loads(new.config.read_text())
        assert config["parent"] == "mislabelled@30"
        kept = read_pairs(new.pairs)
        assert len(kept) == pairs
        assert sum(bool(p.held_out) for p in kept) == 4
        first = next(e for e in events if e["type"] == "evaluated")
        assert first["margin"] != first["base"]["margin"]  # it does not begin at the base model
    turned = kept[WRONG]
    assert (turned.chosen.name, turned.rejected.name) == (f"rejected-{WRONG}.png", f"chosen-{WRONG}.png")


def test_a_continued_run_resumes_from_its_own_checkpoints(new_run: Run) -> None:
    parent = new_run("parent", training={"steps": 2})
    run_here(parent)
    new = continue_run(parent, settings={"optimizer": {"type": "adafactor"}})
    config = json.loads(new.config.read_text())
    assert new.name == "parent-next"
    assert config["training"]["steps"] == 2  # the parent had none left
    assert not prepare(new, None, None).optimizer.state_dict()["state"]  # another optimizer's state is of no use
    run_here(new)
    assert prepare(new, None, None).step == 2


def test_what_cannot_be_continued_is_said(new_run: Run) -> None:
    run = new_run("refused", training={"steps": 1})
    with pytest.raises(RunError, match="no checkpoint"):
        continue_run(run)
    with pytest.raises(RunError, match="no checkpoint"):
        inspect_run(run)
    run_here(run)
    with pytest.raises(PairsError, match="no pair 99"):
        continue_run(run, exclude=[99])
    with pytest.raises(PairsError, match="left out and turned round"):
        continue_run(run, exclude=[1], flip=[1])
    with pytest.raises(PairsError, match="No pair to train on"):
        continue_run(run, exclude=range(12))
    new = continue_run(run)
    (new.path / START).rename(new.path / "elsewhere")
    with pytest.raises(RunError, match="interrupted"):
        prepare(RunDir(new.path), None, None)


def test_classes() -> None:
    assert classify(0.1, 0.01, 0.2, None) == "learned"
    assert classify(-0.1, 0.01, 0.2, None) == "resisted"
    assert classify(-0.001, 0.01, -0.2, None) == "resisted"
    assert classify(0.001, 0.01, 0.2, None) == "undecided"
    assert classify(0.1, 0.01, 0.2, (-0.3, 0.1)) == "harmful"
    assert classify(0.1, 0.01, 0.2, (-0.15, 0.1)) == "learned"  # within the noise of its influence
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
