"""The rules of the rooms (docs/architecture.md): who may import what, read from the source itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "mapo_core"
FACES = {"comfy", "comfy_api", "comfy_extras", "execution", "folder_paths", "gradio", "nodes", "server", "web"}
HEAVY = {"accelerate", "bitsandbytes", "diffusers", "peft", "torch", "transformers"}


def modules(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found, f"no Python files in {folder}"
    return found


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute names of everything that a file imports, wherever in it, with the line."""
    package = path.relative_to(ROOT).parent.parts  # of __init__.py too: level 1 is the folder that it stands in
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}", node.lineno


def offences(files: list[Path], allowed: object) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in imported(path)
        if not allowed(name)  # type: ignore[operator]
    ]


def test_the_core_knows_no_user_interface() -> None:
    assert offences(modules(CORE), lambda name: name.split(".")[0] not in FACES) == []


def test_runs_need_the_standard_library_alone() -> None:
    def allowed(name: str) -> bool:
        own = ("mapo_core.errors", "mapo_core.runs")
        return name.split(".")[0] in sys.stdlib_module_names or name.startswith(own)

    assert offences(modules(CORE / "runs"), allowed) == []


def test_methods_are_mathematics() -> None:
    """Numbers in, numbers out: torch and pydantic, no files, no model, no settings but their own."""
    standard = {"__future__", "collections", "dataclasses", "enum", "functools", "itertools", "math", "typing"}

    def allowed(name: str) -> bool:
        own = ("mapo_core.methods", "mapo_core._settings", "mapo_core.errors")
        return name.split(".")[0] in {*standard, "torch", "pydantic"} or name.startswith(own)

    files = modules(CORE / "methods")
    assert offences(files, allowed) == []
    for path in files:
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id in {"open", "print"}], path


def test_the_checks_above_see_relative_and_nested_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mapo_core" / "runs"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import events\n")
    (package / "launch.py").write_text("def start():\n    import gradio\n    from ..config import TrainConfig\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)

    assert [name for name, _ in imported(package / "__init__.py")] == ["mapo_core.runs.events"]
    assert [name for name, _ in imported(package / "launch.py")] == ["gradio", "mapo_core.config.TrainConfig"]
    assert len(offences(modules(package), lambda name: not name.startswith(("gradio", "mapo_core.config")))) == 2


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import mapo_core"],
        ["-c", "import mapo_core.config, mapo_core.methods, mapo_core.runs, mapo_core.pairs"],
        ["-m", "mapo_core", "--help"],
        ["-m", "mapo_core", "train", "--help"],
        ["-m", "mapo_core", "runs"],
    ],
    ids=lambda command: " ".join(command),
)
def test_nothing_heavy_is_imported_early(command: list[str], tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", *command],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    names = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "mapo_core" in names
    assert sorted(names & HEAVY) == []


def environment(home: Path) -> dict[str, str]:
    import os

    return {**os.environ, "MAPO_HOME": str(home), "PYTHONIOENCODING": "utf-8"}
