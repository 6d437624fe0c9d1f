"""What the routes find, refuse and show. The pack is loaded as ComfyUI does it, under another name, without ComfyUI."""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mapo_core.runs import EventWriter, RunDir, create_run

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"model": {"path": "C:\\models\\sd_xl_base.safetensors"}, "method": {"type": "mapo"}, "training": {"steps": 9}}


@pytest.fixture(scope="module")
def view() -> Iterator[ModuleType]:
    """nodes/_run_view.py inside a package of another name; the package's own files are not run."""
    for name, folder in (("pack_under_test", ROOT), ("pack_under_test.nodes", ROOT / "nodes")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    yield importlib.import_module("pack_under_test.nodes._run_view")
    for name in [n for n in sys.modules if n.split(".")[0] == "pack_under_test"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "mapo 家"
    monkeypatch.setenv("MAPO_HOME", str(path))
    return path


@pytest.fixture
def run() -> RunDir:
    return create_run("ink wash", json.dumps(CONFIG), "")


def step(n: int, chosen: float = 0.2, rejected: float | None = 0.5) -> dict[str, object]:
    return {"steps": 9, "loss": 1.0 / n, "chosen_mse": chosen, "rejected_mse": rejected, "seconds_left": 9.0 - n}


def write(run: RunDir, *, end: bool = True, steps: int = 3) -> None:
    """A run of a few steps with a measure, a picture, a checkpoint and a LoRA."""
    run.checkpoint_path(steps).mkdir()
    (run.samples / "step_00000003.png").write_bytes(b"picture")
    (run.export / "ink wash.safetensors").write_bytes(b"weights")
    run.log.write_text("loading\r50%\rloaded\nno more\n")
    with EventWriter(run) as events:
        events.emit("run_started", 0, steps=9)
        events.emit("phase", 0, phase="ready", pairs_per_step=8, device="cpu")
        for n in range(1, steps + 1):
            events.emit("step", n, **step(n))
        events.emit("evaluated", steps, accuracy=0.9, margin=0.3, base={"accuracy": 0.25, "margin": -0.1})
        events.emit("warning", steps, message="Careful.")
        events.emit("sample_saved", steps, path="samples/step_00000003.png", prompts=["a boat"])
        if end:
            events.emit("run_stopped", steps, lora="export/ink wash.safetensors", message="Stopped.")


def no_copy(path: Path) -> str | None:
    return None


# --- finding ---------------------------------------------------------------------------------------------------------


def test_a_run_is_found_by_its_name(view: ModuleType, run: RunDir) -> None:
    assert view.find_run("ink wash").path == run.path


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../ink wash", "a/b", "a\\b", "C:x", ".tmp-1-x-ink", "ink\x00wash", "a\n"]
)
def test_what_is_no_name_is_refused(view: ModuleType, run: RunDir, name: str) -> None:
    with pytest.raises(view.RefusedError, match="cannot be the name") as refusal:
        view.find_run(name)
    assert refusal.value.status == 400


def test_a_run_that_is_not_there(view: ModuleType, run: RunDir) -> None:
    with pytest.raises(view.RefusedError, match="no run 'oil'") as refusal:
        view.find_run("oil")
    assert refusal.value.status == 404


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_run_folder_that_is_a_link_is_refused(view: ModuleType, run: RunDir, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    run.path.rename(outside)
    run.path.symlink_to(outside, target_is_directory=True)

    with pytest.raises(view.RefusedError, match="link to another place") as refusal:
        view.find_run("ink wash")

    assert refusal.value.status == 403
    assert view.RunList().read(no_copy) == []


def test_pictures_and_loras_are_found(view: ModuleType, run: RunDir) -> None:
    write(run)
    (run.samples / "base").mkdir()
    (run.samples / "base" / "00.png").write_bytes(b"picture")

    for path in ("samples/step_00000003.png", "samples/base/00.png", "export/ink wash.safetensors"):
        assert view.find_file(run, path) == run.path / path


@pytest.mark.parametrize(
    "path",
    [
        "config.json",
        "events.jsonl",
        "train.log",
        "samples/../config.json",
        "samples/../../ink wash/samples/step_00000003.png",
        "samples\\step_00000003.png",
        "/samples/step_00000003.png",
        "checkpoints/step_00000003/lora.safetensors",
        "samples",
        "samples/notes.txt",
        "export/deeper/x.safetensors",
        "",
    ],
)
def test_other_files_are_refused(view: ModuleType, run: RunDir, path: str) -> None:
    write(run)
    with pytest.raises(view.RefusedError, match="Only the pictures and the LoRA files") as refusal:
        view.find_file(run, path)
    assert refusal.value.status == 403


def test_a_picture_that_is_not_there(view: ModuleType, run: RunDir) -> None:
    with pytest.raises(view.RefusedError, match="has no file") as refusal:
        view.find_file(run, "samples/step_00000007.png")
    assert refusal.value.status == 404


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_links_out_of_the_run_are_refused(view: ModuleType, run: RunDir, tmp_path: Path, what: str) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    if what == "file":
        (run.samples / "secret.png").symlink_to(tmp_path / "secret.png")
        path = "samples/secret.png"
    else:
        (run.samples / "there").symlink_to(tmp_path, target_is_directory=True)
        path = "samples/there/secret.png"

    with pytest.raises(view.RefusedError, match="link to a place outside") as refusal:
        view.find_file(run, path)
    assert refusal.value.status == 403


# --- showing ---------------------------------------------------------------------------------------------------------


def test_a_run_in_the_list(view: ModuleType, run: RunDir) -> None:
    write(run)

    [entry] = view.RunList().read(lambda path: f"mapo/{path.name}")

    json.dumps(entry, allow_nan=False)
    shown = {k: entry[k] for k in ("name", "state", "alive", "step", "steps", "method", "model", "message")}
    assert shown == {
        "name": "ink wash",
        "state": "stopped",
        "alive": False,
        "step": 3,
        "steps": 9,
        "method": "mapo",
        "model": "sd_xl_base",
        "message": "Stopped.",
    }
    assert (entry["accuracy"], entry["base_accuracy"]) == (0.9, 0.25)
    assert (entry["lora"], entry["lora_copy"]) == ("export/ink wash.safetensors", "mapo/ink wash.safetensors")
    assert entry["sample"] == "samples/step_00000003.png"
    assert (entry["can_resume"], entry["resume_step"]) == (True, 3)
    assert entry["seconds_left"] is None


def test_a_run_in_full(view: ModuleType, run: RunDir) -> None:
    write(run)

    shown = view.detail(run, no_copy)

    assert [(p["step"], p["loss"], p["margin"]) for p in shown["curve"]] == [
        (1, 1.0, pytest.approx(0.3)),
        (2, 0.5, pytest.approx(0.3)),
        (3, pytest.approx(1 / 3), pytest.approx(0.3)),
    ]
    assert [(e["step"], e["accuracy"], e["base_margin"]) for e in shown["evaluated"]] == [(3, 0.9, -0.1)]
    assert shown["samples"] == [{"step": 3, "path": "samples/step_00000003.png", "prompts": ["a boat"]}]
    assert shown["checkpoints"] == [3]
    assert shown["warnings"] == [{"step": 3, "message": "Careful."}]
    assert shown["log"] == "loaded\nno more"
    assert (shown["pairs_per_step"], shown["device"]) == (8, "cpu")


def test_a_run_that_is_being_trained(view: ModuleType, run: RunDir) -> None:
    """The events carry this process's id, and this process lives."""
    write(run, end=False)
    with EventWriter(run) as events:
        events.emit("phase", 3, phase="measuring held-out pairs", done=2, total=8)

    shown = view.detail(run, no_copy)

    assert (shown["state"], shown["alive"], shown["can_resume"]) == ("running", True, False)
    assert shown["seconds_left"] == 6.0
    assert shown["phase"] == {"phase": "measuring held-out pairs", "done": 2, "total": 8}


def test_a_step_ends_the_phase_before_it(view: ModuleType, run: RunDir) -> None:
    write(run, end=False)
    assert view.detail(run, no_copy)["phase"] is None


def test_a_long_run_is_cut_to_what_a_chart_can_show(view: ModuleType, run: RunDir) -> None:
    write(run, steps=1500)

    shown = view.detail(run, no_copy)

    assert len(shown["curve"]) <= view.CURVE_POINTS
    assert shown["curve"][-1]["step"] == 1500
    [entry] = view.RunList().read(no_copy)
    assert len(entry["curve"]) <= view.SMALL_CURVE_POINTS


def test_undone_steps_are_not_shown(view: ModuleType, run: RunDir) -> None:
    write(run)
    with EventWriter(run) as events:
        events.emit("run_resumed", 1)
        events.emit("step", 2, **step(2, rejected=None))
        events.emit("run_stopped", 2)

    shown = view.detail(run, no_copy)

    assert [(p["step"], p["margin"]) for p in shown["curve"]] == [(1, pytest.approx(0.3)), (2, None)]
    assert (shown["evaluated"], shown["samples"], shown["accuracy"]) == ([], [], None)


def test_a_lora_that_was_deleted_is_not_offered(view: ModuleType, run: RunDir) -> None:
    write(run)
    (run.export / "ink wash.safetensors").unlink()
    assert view.detail(run, no_copy)["lora"] is None


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"model": 3}'])
def test_settings_that_cannot_be_read_hide_no_run(view: ModuleType, config: str) -> None:
    run = create_run("odd", "{}", "")
    run.config.write_text(config)

    [entry] = view.RunList().read(no_copy)

    assert (entry["name"], entry["state"], entry["model"], entry["curve"]) == ("odd", "created", "", [])


def test_the_list_follows_the_events(view: ModuleType, run: RunDir) -> None:
    write(run)
    runs = view.RunList()
    assert runs.read(no_copy) == runs.read(no_copy)

    with EventWriter(run) as events:
        events.emit("run_resumed", 3)
        events.emit("run_finished", 9, lora="export/ink wash.safetensors")
    [entry] = runs.read(no_copy)

    assert (entry["state"], entry["step"], entry["can_resume"]) == ("finished", 9, False)


def test_only_a_changed_run_is_read_again(view: ModuleType, run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    write(run)
    runs = view.RunList()
    runs.read(no_copy)

    monkeypatch.setattr(view, "summary", lambda run: pytest.fail("an unchanged run was read again"))
    assert [entry["name"] for entry in runs.read(no_copy)] == ["ink wash"]


def test_a_long_log_is_shown_from_a_whole_line(view: ModuleType, run: RunDir) -> None:
    run.log.write_text("".join(f"line {n}\n" for n in range(5000)))

    lines = view.log_tail(run.log).splitlines()

    assert lines[-1] == "line 4999"
    assert lines[0].startswith("line ")
    assert len("\n".join(lines)) <= view.LOG_TAIL_BYTES
    assert view.log_tail(run.path / "nothing.log") == ""
