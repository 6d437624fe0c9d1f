"""What the tests of runs share."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mapo_core.runs import RunDir, attach, create_run, launch

STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "Zuhause mit Leerzeichen 家"


@pytest.fixture
def run(home: Path) -> RunDir:
    return create_run("ink", "{}", "", home)


@pytest.fixture(scope="session")
def stand_in() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stand_in", STAND_IN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunDir]]:
    """Makes runs that the stand-in trains; none of their processes survives the test."""
    monkeypatch.setattr(launch, "MAIN", STAND_IN)
    made: list[RunDir] = []

    def make(**settings: Any) -> RunDir:
        made.append(create_run("ink wash", json.dumps({"steps": 3, **settings}), "", home))
        return made[-1]

    yield make
    for run in made:
        if handle := attach(run):
            handle.kill()


@pytest.fixture
def until() -> Callable[[Callable[[], object]], None]:
    """Waits for a condition, and fails when it does not come true."""

    def wait(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.01)

    return wait
