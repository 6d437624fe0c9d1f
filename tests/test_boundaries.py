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


PUBLIC = {"mapo_core", "mapo_core.evaluate", "mapo_core.pairs", "mapo_core.runs"}
COMFYUI = {"comfy", "comfy_extras", "execution", "folder_paths", "server", "aiohttp"}


def public_names(package: str) -> set[str]:
    import importlib

    return set(importlib.import_module(package).__all__)


def test_the_nodes_use_the_public_api_alone() -> None:
    """What is public is listed in `__all__`; a submodule is not, and neither is a name with an underscore."""
    for path in modules(ROOT / "nodes"):
        for name, line in imported(path):
            package, _, last = name.rpartition(".")
            if name.startswith("mapo_core"):
                public = name in PUBLIC or (package in PUBLIC and last in public_names(package))
                assert public, f"{path.name}:{line} imports {name}, which is not public"


def test_few_node_files_know_more_of_comfyui_than_its_node_api() -> None:
    for path in modules(ROOT / "nodes"):
        free = path.name in ("_comfy.py", "_routes.py")
        for name, line in imported(path):
            top = name.split(".")[0]
            assert top not in COMFYUI or free, f"{path.name}:{line} imports {name}"
            assert top != "comfy_api" or name.startswith("comfy_api.latest."), f"{path.name}:{line} imports {name}"
            assert top not in FACES - COMFYUI - {"comfy_api", "nodes"}, f"{path.name}:{line} imports {name}"


def test_the_nodes_are_imported_under_any_name() -> None:
    """ComfyUI imports the pack under a name made from its path, so `import mapo_core` would find nothing there."""
    for path in modules(ROOT / "nodes"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            own = [n for n in names if n.split(".")[0] in {"mapo_core", "nodes", "web", "scripts"}]
            assert not own, f"{path.name}: {own} must be relative"


def test_the_checks_above_see_relative_and_nested_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mapo_core" / "runs"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import events\n")
    (package / "launch.py").write_text("def start():\n    import gradio\n    from ..config import TrainConfig\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)

    assert [name for name, _ in imported(package / "__init__.py")] == ["mapo_core.runs.events"]
    assert [name for name, _ in imported(package / "launch.py")] == ["gradio", "mapo_core.config.TrainConfig"]
    assert len(offences(modules(package), lambda name: not name.startswith(("gradio", "mapo_core.config")))) == 2


def test_the_page_uses_the_public_api_alone() -> None:
    """No torch, no ComfyUI, and of the core what is listed in `__all__`."""
    free = {"gradio", "pandas", "PIL", "starlette", "web", "yaml", "mapo_core"}
    for path in modules(ROOT / "web" / "gradio_app"):
        for name, line in imported(path):
            package, _, last = name.rpartition(".")
            top = name.split(".")[0]
            assert top in free or top in sys.stdlib_module_names, f"{path.name}:{line} imports {name}"
            if top == "mapo_core":
                public = name in PUBLIC or (package in PUBLIC and last in public_names(package))
                assert public, f"{path.name}:{line} imports {name}, which is not public"


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import mapo_core"],
        ["-c", "import mapo_core.config, mapo_core.methods, mapo_core.runs, mapo_core.pairs"],
        ["-m", "mapo_core", "--help"],
        ["-m", "mapo_core", "train", "--help"],
        ["-m", "mapo_core", "runs"],
        ["-m", "mapo_core", "queue"],
        ["-c", "import mapo_core, web.gradio_app.app"],  # the page's own process stays small
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
