"""What we require fits beside what ComfyUI requires, without changing a version of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT


def resolved(*lists: Path) -> dict[str, str]:
    """Name -> version of what pip would install for these lists into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    for path in lists:
        command += ["-r", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    return {re.sub(r"[-_.]+", "-", i["metadata"]["name"]).lower(): i["metadata"]["version"] for i in report["install"]}


@pytest.mark.network
@pytest.mark.comfyui
@pytest.mark.timeout(1800)
def test_requirements_resolve_beside_comfyuis_without_changing_a_version(installation: tuple[Path, str]) -> None:
    own = installation[0] / "requirements.txt"
    alone, together = resolved(own), resolved(own, ROOT / "requirements.txt")
    assert {name: (version, together[name]) for name, version in alone.items() if together[name] != version} == {}
    assert {"diffusers", "peft", "accelerate", "bitsandbytes"} <= together.keys()
