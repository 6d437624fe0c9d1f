"""`run_measure`: its child ends when it is cancelled, when its parent dies, and tells its errors."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from mapo_core.errors import MapoError, MissingWeightsError, PairsError
from mapo_core.evaluate import process as module
from mapo_core.evaluate import run_measure


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for `__main__.py`; tests write what it does."""
    path = tmp_path / "child.py"
    monkeypatch.setattr(module, "MAIN", path)
    return path


def says(path: Path, code: str) -> None:
    root = Path(module.__file__).resolve().parents[2]
    head = f"import sys; sys.path.insert(0, {str(root)!r})\nfrom mapo_core.cli_measures import Lines\nlines = Lines()\n"
    path.write_text(head + textwrap.dedent(code), encoding="utf-8")


def test_progress_phases_and_the_result_come_through_whatever_else_is_printed(child: Path) -> None:
    says(
        child,
        """
        import os
        print("a library greets")
        os.write(1, b"so does C\\n")
        lines.phase("drawing ü")
        lines.progress(1, 2)
        lines.result({"arguments": sys.argv[1:], "nan": float("nan")}, "")
        """,
    )
    done: list[tuple[int, int]] = []
    phases: list[str] = []
    found = run_measure(["evaluate", "a run"], progress=lambda *d: done.append(d), phase=phases.append)
    assert found == {"arguments": ["evaluate", "a run", "--json-lines"], "nan": None}
    assert (done, phases) == ([(1, 2)], ["drawing ü"])


def test_errors_keep_their_class_and_words(child: Path) -> None:
    says(
        child,
        """
        from mapo_core.errors import MissingWeightsError
        lines.out.error(MissingWeightsError("hf download x"))
        sys.exit(1)
        """,
    )
    with pytest.raises(MissingWeightsError, match="hf download x"):
        run_measure(["evaluate"])
    says(child, "raise RuntimeError('out of memory')")
    with pytest.raises(MapoError, match=r"(?s)ended with code 1.*out of memory") as caught:
        run_measure(["evaluate"])
    assert not isinstance(caught.value, PairsError)


def test_a_cancelled_child_is_gone(child: Path, tmp_path: Path) -> None:
    says(
        child,
        f"""
        import os, time
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        lines.phase("waiting")
        time.sleep(600)
        """,
    )
    phases: list[str] = []
    assert run_measure(["mismatch"], phase=phases.append, cancelled=lambda: bool(phases)) is None
    from mapo_core.runs import process_start_time

    assert process_start_time(int((tmp_path / "pid").read_text())) is None


def test_the_child_ends_when_its_parent_dies(child: Path, tmp_path: Path) -> None:
    import subprocess
    import time

    from mapo_core.runs import process_start_time

    says(
        child,
        f"""
        import os, time
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        lines.phase("waiting")
        time.sleep(600)
        """,
    )
    root = Path(module.__file__).resolve().parents[2]
    parent = f"""
import os, pathlib, sys
sys.path.insert(0, {str(root)!r})
from mapo_core.evaluate import process
process.MAIN = pathlib.Path({str(child)!r})
process.run_measure(["mismatch"], phase=lambda name: os._exit(9))
"""
    assert subprocess.run([sys.executable, "-c", parent], check=False).returncode == 9
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while process_start_time(pid) is not None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process_start_time(pid) is None
