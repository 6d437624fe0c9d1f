"""How `mapo test` calls pytest."""

from __future__ import annotations

import subprocess
from typing import Any

import pytest

from scripts import check


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What is run instead of ruff, basedpyright and pytest."""
    found: list[tuple[list[str], dict[str, str]]] = []

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        found.append((command[2:], env))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(check.subprocess, "run", run)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return found


@pytest.mark.parametrize(("cores", "processes"), [(2, "2"), (16, "4")])
def test_all_tests_run_in_several_processes_of_one_thread(
    calls: list[tuple[list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch, cores: int, processes: str
) -> None:
    monkeypatch.setattr(check.os, "cpu_count", lambda: cores)
    assert check.main([]) == 0
    command, environment = calls[-1]
    assert command == ["pytest", "-n", processes, "--dist", "loadfile"]
    assert environment["OMP_NUM_THREADS"] == "1"


def test_chosen_tests_and_one_core_run_them_one_after_the_other(
    calls: list[tuple[list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check.main(["test", "tests/methods", "-x"]) == 0
    assert calls[-1][0] == ["pytest", "tests/methods", "-x"]
    assert "OMP_NUM_THREADS" not in calls[-1][1]
    monkeypatch.setattr(check.os, "cpu_count", lambda: 1)
    assert check.main([]) == 0
    assert calls[-1][0] == ["pytest"]
