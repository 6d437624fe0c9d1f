"""TensorBoard and wandb: told what events.jsonl says, and nothing at all by default."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from mapo_core import ConfigError, build_config, tracking
from mapo_core.runs import RunDir, read_events
from mapo_core.session import prepare

from .conftest import run_here

Run = Callable[..., RunDir]

MEASURED = {"every_steps": 2, "draws": 1, "sample_every_steps": 2, "num_inference_steps": 1}


def expected(run: RunDir) -> dict[str, dict[int, float]]:
    """What the events that count say: name -> step -> value."""
    found: dict[str, dict[int, float]] = {}
    for event in read_events(run.events):
        parts = {"train": event} if event["type"] == "step" else {}
        if event["type"] == "evaluated":
            parts = {"held_out": event, "held_out_base": event["base"]}
        for prefix, fields in parts.items():
            for name, value in fields.items():
                if name not in ("v", "time", "type", "step", "steps", "base"):
                    found.setdefault(f"{prefix}/{name}", {})[event["step"]] = value
    return found


def read_back(folder: Path) -> tuple[dict[str, dict[int, float]], dict[str, list[Any]]]:
    """Numbers and images of TensorBoard's files, by TensorBoard's own reader; a step twice would be an error."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    reader.Reload()
    numbers: dict[str, dict[int, float]] = {}
    for tag in reader.Tags()["scalars"]:
        values = reader.Scalars(tag)
        numbers[tag] = {v.step: v.value for v in values}
        assert len(numbers[tag]) == len(values), tag
    return numbers, {tag: reader.Images(tag) for tag in reader.Tags()["images"]}


def assert_same(found: dict[str, dict[int, float]], wanted: dict[str, dict[int, float]], exact: bool = False) -> None:
    assert {"train/loss", "train/learning_rate", "held_out/accuracy", "held_out/margin"} <= found.keys()
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == (values if exact else pytest.approx(values, rel=1e-6)), name  # TensorBoard has float32


def test_tensorboard_has_the_numbers_of_the_events_also_after_a_resume(new_run: Run) -> None:
    pytest.importorskip("tensorboard")
    run = new_run(
        "boards", validation=MEASURED, checkpoint={"every_steps": 2, "keep": 9}, tracking={"trackers": ["tensorboard"]}
    )
    run_here(run)
    folder = run.tracking / "mapo"
    found, images = read_back(folder)
    assert_same(found, expected(run))
    assert set(found["train/loss"]) == {1, 2, 3, 4}
    assert [i.step for i in images["samples"]] == [0, 2, 4]
    settings = [yaml.safe_load(p.read_text()) for p in folder.glob("*/hparams.yml")]
    assert len(settings) == 1
    assert settings[0]["optimizer.learning_rate"] == 1e-3
    assert settings[0]["adapter.targets"] == '["attention"]'

    shutil.rmtree(run.checkpoint_path(4))
    run_here(run)  # from step 2
    again, _ = read_back(folder)
    assert_same(again, expected(run))
    assert again["train/seconds_per_step"][3] != found["train/seconds_per_step"][3]  # it was done again
    assert len(list(folder.glob("*/hparams.yml"))) == 1


@pytest.fixture
def stand_in_wandb(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """A wandb that keeps what it is told; the runs that were begun."""
    import accelerate.tracking

    begun: list[SimpleNamespace] = []
    module: Any = ModuleType("wandb")

    def init(**arguments: Any) -> SimpleNamespace:
        logged: list[dict[str, Any]] = []
        run = SimpleNamespace(arguments=arguments, logged=logged, ended=False, settings={}, axis={})

        def log(values: dict[str, Any], step: int | None = None) -> None:
            assert step is None  # wandb would drop what is below its highest step
            logged.append(values)

        run.log = log
        run.finish = lambda: setattr(run, "ended", True)
        run.define_metric = lambda name, step_metric=None: run.axis.update({name: step_metric})
        module.config = SimpleNamespace(update=lambda values, allow_val_change: run.settings.update(values))
        begun.append(run)
        return run

    module.init = init
    module.Image = lambda array: array.shape
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    available = [*accelerate.tracking._available_trackers, accelerate.tracking.LoggerType.WANDB]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", available)
    return begun


def test_wandb_has_the_numbers_of_the_events_and_a_resume_goes_on_in_its_run(
    new_run: Run, stand_in_wandb: list[SimpleNamespace]
) -> None:
    run = new_run(
        "weights",
        validation=MEASURED,
        checkpoint={"every_steps": 2, "keep": 9},
        tracking={"trackers": ["wandb"], "project": "styles"},
    )
    run_here(run)
    (first,) = stand_in_wandb
    assert first.arguments["project"] == "styles"
    assert first.arguments["name"] == "weights"
    assert first.arguments["dir"] == str(run.tracking)
    assert first.settings["optimizer.learning_rate"] == 1e-3
    assert first.axis == {"step": None, "*": "step"}
    assert first.ended
    assert_same(by_name([first]), expected(run), exact=True)
    sheets = {values["step"]: values["samples"] for values in first.logged if "samples" in values}
    assert set(sheets) == {0, 2, 4}
    assert sheets[4][0][2] == 3  # [H, W, 3]

    shutil.rmtree(run.checkpoint_path(4))
    run_here(run)
    second = stand_in_wandb[1]
    assert second.arguments["id"] == first.arguments["id"]
    assert second.arguments["resume"] == "allow"
    assert min(values["step"] for values in second.logged) == 3
    assert_same(by_name(stand_in_wandb), expected(run), exact=True)


def by_name(runs: list[SimpleNamespace]) -> dict[str, dict[int, float]]:
    """name -> step -> the last value."""
    found: dict[str, dict[int, float]] = {}
    for values in (v for run in runs for v in run.logged):
        for name in values.keys() - {"step", "samples"}:
            found.setdefault(name, {})[values["step"]] = values[name]
    return found


def test_a_tracker_that_fails_leaves_the_run_alone_and_is_said_once(
    new_run: Run, stand_in_wandb: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("broken", tracking={"trackers": ["wandb"]})

    def lose(tracker: Any, step: int, values: dict[str, float]) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(tracking, "_log_numbers", lose)
    run_here(run)
    events = read_events(run.events)
    warnings = [e for e in events if e.get("code") == "tracking"]
    assert len(warnings) == 1
    assert "no route to host" in warnings[0]["message"]
    assert sum(e["type"] == "step" for e in events) == 4
    assert events[-1]["type"] == "run_finished"


def test_a_tracker_that_does_not_start_is_said_before_the_model_is_loaded(
    new_run: Run, stand_in_wandb: list[SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    run = new_run("no-key", tracking={"trackers": ["wandb"]})
    with pytest.raises(ConfigError, match=r"no API key.*wandb login.*WANDB_MODE=offline"):
        run_here(run)
    assert "loading the model" not in [e.get("phase") for e in read_events(run.events)]


def test_a_missing_package_is_said_before_the_model_is_loaded(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    run = new_run("missing", tracking={"trackers": ["tensorboard", "wandb"]})
    with pytest.raises(ConfigError, match="pip install tensorboard wandb"):
        run_here(run)
    assert "loading the model" not in [e.get("phase") for e in read_events(run.events)]
    assert prepare(run, None, None).tracking is None  # who only looks at a run needs none of them
    assert not run.tracking.exists()


def test_by_default_no_tracker_is_even_imported(new_run: Run, tmp_path: Path) -> None:
    """Although both are installed: wandb by a stand-in that is found and cannot be imported."""
    (tmp_path / "wandb.py").write_text("raise RuntimeError('wandb was imported')\n", encoding="utf-8")
    run = new_run("quiet", training={"steps": 1})
    code = """
import sys
from pathlib import Path
from mapo_core.runs import EventWriter, RunDir
from mapo_core.trainer import train
run = RunDir(Path(sys.argv[1]))
with EventWriter(run) as events:
    train(run, events, None)
print(sorted({"tensorboard", "tensorboardX", "wandb"} & {name.split(".")[0] for name in sys.modules}))
"""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(tmp_path), str(root)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(run.path)],
        env={**os.environ, "PYTHONPATH": path},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert not run.tracking.exists()


@pytest.mark.parametrize("project", ["", "..", "../other", "a/b", " mapo", "mapo.", "x" * 101])
def test_a_project_is_a_name_and_no_path(project: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.project"):
        build_config({"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p"}, "tracking": {"project": project}})


def test_settings_are_flat_and_plain() -> None:
    config = build_config({"name": "x", "model": {"path": "demo"}, "data": {"pairs": "p"}})
    flat = tracking.flat_settings(config)
    assert flat["name"] == "x"
    assert flat["method.type"] == config.method.type
    assert "model.vae" not in flat  # None
    assert json.loads(str(flat["adapter.targets"])) == list(config.adapter.targets)
    assert all(isinstance(value, bool | int | float | str) for value in flat.values())
