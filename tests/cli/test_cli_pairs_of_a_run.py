"""`mapo inspect` and `mapo continue` as a user types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mapo_core.cli import main
from mapo_core.continuation import read_inspection
from mapo_core.pairs import read_pairs
from mapo_core.runs import RunDir, open_run, read_events, run_status

from ..training.conftest import Run, _fresh_accelerator, new_run, run_here, shared_home

__all__ = ["_fresh_accelerator", "new_run", "shared_home"]


@pytest.fixture
def trained(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = new_run("typed", training={"steps": 3}, checkpoint={"every_steps": 1})
    monkeypatch.setenv("MAPO_HOME", str(run.path.parent.parent))  # where the commands look for it
    run_here(run)
    return run


def test_inspect_prints_the_pairs_to_look_at_and_keeps_all(trained: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--step 2 --draws 2 --pairs 6 --influence 3 --show 4".split()
    assert main(["inspect", trained.name, *options]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+)  (learned|resisted|harmful|undecided) ", printed, flags=re.MULTILINE)
    assert len(rows) == 4
    assert f"{trained.name}, step 2:" in printed
    stored = read_inspection(trained)
    assert stored is not None
    assert stored["steps"] == [0, 1, 2]
    assert stored["draws"] == 2
    assert len(stored["pairs"]) == 6
    assert sum(p["influence"] is not None for p in stored["pairs"]) == 3
    assert [(str(p["index"]), p["verdict"]) for p in stored["pairs"][:4]] == rows
    assert str(trained.path / "inspection") in printed


def test_continue_goes_on_without_some_pairs_and_with_other_settings(
    trained: RunDir, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    command = [
        "continue",
        trained.name,
        "--exclude",
        "0,2",
        "--flip",
        "5",
        "--step",
        "2",
        "--name",
        f"{trained.name} on",
    ]
    assert main([*command, "--training.steps", "1", "--optimizer.learning_rate", "1e-4"]) == 0
    printed = capsys.readouterr().out
    run = open_run(f"{trained.name} on")
    assert f"Run folder: {run.path}" in printed
    assert run_status(run).state == "finished"
    config = json.loads(run.config.read_text())
    assert config["parent"] == f"{trained.name}@2"
    assert config["training"]["steps"] == 1
    assert config["optimizer"]["learning_rate"] == 1e-4
    before, after = read_pairs(trained.pairs), read_pairs(run.pairs)
    assert len(after) == len(before) - 2
    assert before[0].chosen not in {p.chosen for p in after}
    assert after[3].chosen == before[5].rejected
    assert not [e for e in read_events(run.events) if str(e.get("phase", "")).startswith("encoding")]


WRONG = [
    (["inspect", "{}", "--step", "77"], "has no checkpoint of step 77; it has 1, 2, 3"),
    (["inspect", "{}", "--training.steps", "2"], "takes no settings"),
    (["continue", "{}", "--exclude", "one"], "give pair numbers such as 3,7"),
    (["continue", "{}", "--exclude", "99"], "has no pair 99"),
    (["continue", "{}", "--flip", "1", "--exclude", "1"], "left out and turned round"),
    (["continue", "{}", "--training.stepz", "2"], "did you mean training.steps"),
    (["continue", "{}", "--training.steps"], "needs a value"),
    (["continue", "nobody"], "nobody"),
]


def test_what_cannot_be_done_is_said_and_leaves_no_run(trained: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    runs = set(trained.path.parent.iterdir())
    for arguments, words in WRONG:
        assert main([part.format(trained.name) for part in arguments]) == 1, arguments
        error = capsys.readouterr().err
        assert words in error
        assert "Traceback" not in error
    assert set(trained.path.parent.iterdir()) == runs
