"""The page's own logic, tested by Node.js where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "web" / "comfyui").glob("*.js"))
ENTRY = "mapo.js"
COMFYUI = re.compile(r'from "\.\./\.\./scripts/')


def node() -> str:
    found = shutil.which("node")
    if found is None:
        pytest.skip("Node.js is not installed, so the page's scripts cannot be tested")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.lstrip("v").split(".")[0]) < 18:
        pytest.skip(f"Node.js {version} has no test runner; 18 or later has")
    return found


def test_the_logic_of_the_page() -> None:
    result = subprocess.run(
        [node(), "--test", str(ROOT / "tests" / "web" / "run_view.test.mjs")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_parsed(script: Path) -> None:
    result = subprocess.run([node(), "--check", str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_only_the_entry_talks_to_comfyui() -> None:
    """ComfyUI loads every script as an extension, so all but one must do nothing by themselves."""
    assert [p.name for p in SCRIPTS if COMFYUI.search(p.read_text(encoding="utf-8"))] == [ENTRY]


def test_the_modules_import_without_a_page() -> None:
    modules = [p.as_uri() for p in SCRIPTS if p.name != ENTRY]
    code = "".join(f"await import({uri!r});" for uri in modules)
    result = subprocess.run([node(), "--input-type=module", "-e", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
