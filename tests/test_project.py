"""The project's own files agree with each other: requirements, versions, documents."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import logging
import os
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mapo_core
from scripts import architecture_doc, settings_doc

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}  # where a package is not called what it is imported as


def requirement_lines() -> list[str]:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_have_lower_bounds_only() -> None:
    for line in requirement_lines():
        assert line == "torch" or re.fullmatch(r"[a-z-]+>=[\d.]+", line), line
    assert not [line for line in requirement_lines() if line.startswith("gradio")]


def test_requirements_are_the_projects_dependencies() -> None:
    assert requirement_lines() == PROJECT["dependencies"]


def test_every_import_is_declared() -> None:
    declared = {*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["parquet"]}
    names = {re.split(r"[<>=]", requirement)[0] for requirement in declared}
    importable = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    used: dict[str, str] = {}
    for path in (ROOT / "mapo_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0]: path.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                used[node.module.split(".")[0]] = path.name
    undeclared = {
        n: where for n, where in used.items() if n not in {*sys.stdlib_module_names, *importable, "mapo_core"}
    }
    assert undeclared == {}
    assert importable - {*used, "pyarrow"} == set(), "declared, but not imported"


def test_the_version_is_one_version() -> None:
    assert mapo_core.__version__ == PROJECT["version"]


def test_the_torch_version_is_one_version() -> None:
    text = (ROOT / "scripts" / "torch-version").read_text(encoding="utf-8")
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", text)


def test_the_settings_document_is_up_to_date() -> None:
    written = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert written == settings_doc.settings_markdown(), "run: python scripts/settings_doc.py"


def test_the_file_list_of_the_architecture_is_up_to_date() -> None:
    written = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert written == architecture_doc.with_file_list(written), "run: python scripts/architecture_doc.py"
    for path in (ROOT / "mapo_core").rglob("*.py"):
        if path.read_text(encoding="utf-8").strip():
            assert f"`{path.relative_to(ROOT).as_posix()}`" in written


def test_documents_that_are_named_exist() -> None:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "mapo_core").rglob("*.py")]
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in texts
        for name in re.findall(r"(?<![\w/.])docs/[\w-]+\.md", path.read_text(encoding="utf-8"))
        if not (ROOT / name).is_file()
    }
    assert missing == set()


def test_markers_are_excluded_by_default_and_described() -> None:
    options = PYPROJECT["tool"]["pytest"]["ini_options"]
    names = {marker.split(":")[0] for marker in options["markers"]}
    assert names == {"slow", "cuda", "comfyui", "browser", "network"}
    assert set(options["addopts"][-1].removeprefix("not ").split(" and not ")) == names


@pytest.mark.parametrize("name", ["mapo", "scripts/check", ".ci/run"])
def test_scripts_can_be_executed(name: str) -> None:
    path = ROOT / name
    assert path.read_bytes().startswith(b"#!")
    assert b"\r" not in path.read_bytes()
    assert os.name == "nt" or os.access(path, os.X_OK)


def test_the_batch_file_has_windows_line_ends() -> None:
    """cmd.exe looks for labels wrongly in a file without them."""
    lines = (ROOT / "mapo.bat").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert all(line.endswith(b"\r") for line in lines)
    assert b"mapo.bat" not in (ROOT / ".gitattributes").read_bytes()  # one rule for all of them
    assert b"*.bat text eol=crlf" in (ROOT / ".gitattributes").read_bytes()


@pytest.fixture
def comfy_api(monkeypatch: pytest.MonkeyPatch) -> type:
    """The part of ComfyUI's interface that the entry point touches."""

    class ComfyExtension:
        pass

    package, latest = ModuleType("comfy_api"), ModuleType("comfy_api.latest")
    latest.__dict__.update(ComfyExtension=ComfyExtension)
    monkeypatch.setitem(sys.modules, "comfy_api", package)
    monkeypatch.setitem(sys.modules, "comfy_api.latest", latest)
    return ComfyExtension


def test_comfyui_loads_the_pack_and_is_told_that_it_has_no_nodes(
    comfy_api: type, caplog: pytest.LogCaptureFixture
) -> None:
    spec = importlib.util.spec_from_file_location("a name made from a path", ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS")  # would win over the entry point

    with caplog.at_level(logging.INFO):
        extension = asyncio.run(pack.comfy_entrypoint())
    assert isinstance(extension, comfy_api)
    assert asyncio.run(extension.get_node_list()) == []
    assert [record.getMessage() for record in caplog.records if "not part of this version" in record.getMessage()]
