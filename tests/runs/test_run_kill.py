"""A kill at any write leaves a run that can be read and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from mapo_core.runs import RunDir, list_runs, read_events, run_status

STAND_IN = Path(__file__).with_name("stand_in.py")
KILLED = (-9, 137)


def play(home: Path, fault: str) -> int:
    """One session in a process of its own; -I -S only makes Python start faster."""
    command = [sys.executable, "-I", "-S", str(STAND_IN), "session", str(home)]
    return subprocess.run(command, env={**os.environ, "MAPO_FAULT": fault}, check=False).returncode


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith((".tmp-", ".old-"))]


def visible_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name.startswith((".tmp-", ".old-")):
            continue
        if path.is_dir():
            yield from visible_files(path)
        else:
            yield path


def check_readable(run: RunDir, stand_in: ModuleType) -> None:
    for path in visible_files(run.path):
        if path.name == "config.json":
            assert json.loads(path.read_text(encoding="utf-8")) == stand_in.SESSION
        elif path.name == "pairs.jsonl":
            assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "a house"}
        elif path.suffix == ".safetensors":
            assert int(path.read_text()) == final_state(stand_in)
        elif path.name == "events.jsonl":
            for line in path.read_bytes().split(b"\n")[:-1]:
                json.loads(line)
    for checkpoint in run.list_checkpoints():
        stand_in.load_state(checkpoint)


def final_state(stand_in: ModuleType) -> int:
    state = 7
    for step in range(1, stand_in.SESSION["steps"] + 1):
        state = stand_in.next_state(state, step)
    return state


def check_finished(run: RunDir, stand_in: ModuleType) -> None:
    check_readable(run, stand_in)
    assert run_status(run).state == "finished"
    steps = [event["step"] for event in read_events(run.events) if event["type"] == "step"]
    assert steps == list(range(1, stand_in.SESSION["steps"] + 1))
    assert (run.export / "ü.safetensors").read_text() == str(final_state(stand_in))
    assert leftovers(run.path.parent) == []
    assert run.pending() == []


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("points")
    assert play(folder / "home", f"list:{folder / 'points.txt'}") == 0
    return (folder / "points.txt").read_text(encoding="utf-8").splitlines()


def test_the_points_cover_every_kind_of_write(points: list[str]) -> None:
    for expected in (
        "config.json:half",
        "pairs.jsonl:replaced",
        "run:created",
        "events.jsonl:half",
        "step_00000002:opened",
        "step_00000002:set aside",
        "step_00000002:moved in",
        "step_00000002:renamed",
        "requests/save:answered",
        "ü.safetensors:half",
    ):
        assert expected in points


def test_a_kill_at_every_write_point(points: list[str], tmp_path: Path, stand_in: ModuleType) -> None:
    def kill_and_go_on(number: int) -> None:
        point = f"point {number}, {points[number - 1]}"
        home = tmp_path / str(number)
        assert play(home, str(number)) in KILLED, point
        for run in list_runs(home):
            check_readable(run, stand_in)
            status = run_status(run)
            assert status.state in {"created", "interrupted", "finished"}, point
            assert not status.alive
        run = stand_in.session(home)
        assert list_runs(home) == [run], point
        check_finished(run, stand_in)

    # Most of the time goes into waiting for the disk.
    with ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(kill_and_go_on, range(1, len(points) + 1)))


def test_kills_in_a_row(points: list[str], tmp_path: Path, stand_in: ModuleType) -> None:
    """Each session gets two thirds as far as a whole one, from where the last one was killed."""
    kills = 0
    while (code := play(tmp_path, str(len(points) * 2 // 3))) != 0:
        kills += 1
        assert code in KILLED
        assert kills < 5
    assert kills >= 1
    check_finished(list_runs(tmp_path)[0], stand_in)
