"""The project's own files agree with each other: requirements, versions, documents."""

from __future__ import annotations

import ast
import asyncio
import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import mapo_core
from scripts import architecture_doc, node_docs, settings_doc
from scripts.comfy_stand_in import loaded_pack, schemas

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
ADVICE = "run: python scripts/node_docs.py"
OWN = {"mapo_core", "tokenizers"}  # tokenizers is a part of transformers
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
    extras = PROJECT["optional-dependencies"]
    declared = {*PROJECT["dependencies"], *extras["parquet"], *extras["optimizers"]}
    names = {re.split(r"[<>=]", requirement)[0] for requirement in declared}
    importable = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}
    used: dict[str, str] = {}
    for path in (ROOT / "mapo_core").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0]: path.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                used[node.module.split(".")[0]] = path.name
    undeclared = {n: where for n, where in used.items() if n not in {*sys.stdlib_module_names, *importable, *OWN}}
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


def test_the_texts_of_the_nodes_are_up_to_date() -> None:
    infos = schemas()
    assert node_docs.LOCALE.read_text(encoding="utf-8") == node_docs.locale_text(infos), ADVICE
    assert {page.stem for page in node_docs.PAGES.glob("*.md")} == set(infos), ADVICE
    for name, info in infos.items():
        page = (node_docs.PAGES / f"{name}.md").read_text(encoding="utf-8")
        assert page == node_docs.page_text(page, info), ADVICE


def test_every_node_says_what_it_and_its_inputs_are() -> None:
    known = set()
    for name, info in schemas().items():
        assert name.startswith("MaPO")
        assert info["description"].endswith("."), name
        for input_name, spec in node_docs.inputs(info).items():
            known |= {input_name, f"{name}.{input_name}"}
            assert spec[1].get("tooltip"), f"{name}: {input_name} has no tooltip"
            # the page's translator would read these signs as its own
            assert not re.search(r"[{}@|]", spec[1]["tooltip"]), f"{name}: {input_name}"
        assert all(info["output_name"]), name
    assert set(node_docs.NAMES) <= known, "names of inputs that are gone"


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


def test_an_entry_point_that_fails_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with loaded_pack(tmp_path) as (pack, _):
        monkeypatch.setitem(sys.modules, f"{pack.__name__}.nodes", None)
        with pytest.raises(ImportError):
            asyncio.run(pack.comfy_entrypoint())
    assert "Traceback" in caplog.text
