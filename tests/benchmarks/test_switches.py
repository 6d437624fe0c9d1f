"""The benchmark of the switches compares each with itself switched off, and says what a device cannot do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import switches


def test_each_switch_is_on_in_one_session_and_off_in_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mapo_core import trainer

    seen: dict[str, list[tuple[bool, ...]]] = {}
    real = trainer.train_step

    def noted(session, group, buckets):
        memory = session.config.memory
        seen.setdefault(session.run.name, []).append((memory.prefetch, memory.channels_last, len(group)))
        return real(session, group, buckets)

    monkeypatch.setattr(trainer, "train_step", noted)
    monkeypatch.setenv("MAPO_HOME", "replaced")
    out = tmp_path / "out.json"
    command = ["switches.py", "--size", "tiny", "--device", "cpu", "--rounds", "2", "--work", str(tmp_path / "work")]
    names = ["memory.prefetch", "memory.channels_last", "memory.tf32"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(out), "--switches", *names])
    switches.main()
    assert seen == {
        "switch-memory-prefetch-True": [(True, False, 4)] * 3,
        "switch-memory-prefetch-False": [(False, False, 4)] * 3,
        "switch-memory-channels_last-True": [(False, True, 1)] * 3,
        "switch-memory-channels_last-False": [(False, False, 1)] * 3,
    }
    found = json.loads(out.read_text())["switches"]
    assert len(found["memory.prefetch"]["ratios"]) == 2
    assert found["memory.prefetch"]["min"] <= found["memory.prefetch"]["median"] <= found["memory.prefetch"]["max"]
    assert "without CUDA" in found["memory.tf32"]["impossible"]
    assert "| `memory.channels_last` |" in capsys.readouterr().out


def test_a_switch_that_is_refused_is_reported_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from argparse import Namespace

    import torch

    from mapo_core import speed

    monkeypatch.setattr(speed.shutil, "which", lambda name: None)
    monkeypatch.setenv("MAPO_HOME", str(tmp_path / "home"))
    options = Namespace(size="tiny", batch=1, rounds=1, work=tmp_path, threads=1)
    found = switches.measure("memory.compile", options, torch.device("cpu"))
    assert "C++ compiler" in found["impossible"]
    assert "not measured" in switches.row("memory.compile", found)
