"""A real ComfyUI with this folder as its custom node: COMFYUI_DIR is the installation, COMFYUI_PYTHON its Python."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0


@dataclass
class Comfy:
    """A running server."""

    url: str
    base: Path
    process: subprocess.Popen[bytes]

    @property
    def log(self) -> str:
        """What the server has printed."""
        return (self.base / "server.log").read_text(encoding="utf-8", errors="replace")

    @property
    def runs(self) -> Path:
        """Where the runs lie."""
        return self.base / "output" / "mapo" / "runs"

    def get(self, path: str) -> Any:
        """JSON of a route."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a POST."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or b"null")

    def queue(self, prompt: dict[str, Any]) -> str:
        """Queue a prompt that must be accepted; its id."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        assert status == 200, answer
        assert not answer["node_errors"], answer
        return answer["prompt_id"]

    def wait(self, prompt_id: str, timeout_s: float = 600.0) -> dict[str, Any]:
        """The history entry of a prompt once it has ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return entry
            assert self.process.poll() is None, self.log[-3000:]
            time.sleep(0.2)
        raise AssertionError(f"prompt {prompt_id} did not end\n{self.log[-3000:]}")

    def run(self, prompt: dict[str, Any], timeout_s: float = 600.0) -> dict[str, Any]:
        """Queue a prompt and give the outputs of its nodes; it must succeed."""
        entry = self.wait(self.queue(prompt), timeout_s)
        assert entry["status"]["status_str"] == "success", entry["status"]
        return entry["outputs"]

    def complaint(self, prompt: dict[str, Any]) -> str:
        """What a person is told of a prompt that must fail, at once or when it runs."""
        status, answer = self.post("/prompt", {"prompt": prompt})
        if status != 200 or answer["node_errors"]:  # 200 where another output of the prompt is right
            return json.dumps(answer, ensure_ascii=False)
        entry = self.wait(answer["prompt_id"])
        failed = [detail for kind, detail in entry["status"]["messages"] if kind == "execution_error"]
        assert failed, entry["status"]
        return failed[0]["exception_message"]


@pytest.fixture(scope="session")
def installation() -> tuple[Path, str]:
    """Folder and Python of the ComfyUI under test."""
    folder = os.environ.get("COMFYUI_DIR")
    if not folder:
        pytest.skip("set COMFYUI_DIR (and COMFYUI_PYTHON) to a ComfyUI installation")
    place = Path(folder).resolve()
    assert (place / "main.py").is_file(), f"{place} has no main.py: it is not a ComfyUI"
    own = [place / "venv" / "bin" / "python", place / ".venv" / "bin" / "python"]
    return place, os.environ.get("COMFYUI_PYTHON") or next((str(p) for p in own if p.exists()), sys.executable)


@pytest.fixture(scope="session")
def start_comfy(
    installation: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Comfy]]:
    """Starts servers on free ports, each with a base folder of its own; ends them all."""
    started: list[Comfy] = []

    def start() -> Comfy:
        base = tmp_path_factory.mktemp("comfy base")
        for name in ("custom_nodes", "input", "output", "temp", "user", "models/checkpoints", "models/loras"):
            (base / name).mkdir(parents=True)
        (base / "custom_nodes" / "ComfyUI-MaPO").symlink_to(ROOT, target_is_directory=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder, python = installation
        env = {k: v for k, v in os.environ.items() if k not in ("MAPO_HOME", "PYTHONPATH")}
        with (base / "server.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    *(python, str(folder / "main.py"), "--cpu", "--listen", "127.0.0.1", "--port", str(port)),
                    *("--base-directory", str(base), "--database-url", "sqlite:///:memory:"),
                ],
                cwd=folder,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        comfy = Comfy(f"http://127.0.0.1:{port}", base, process)
        started.append(comfy)
        deadline = time.monotonic() + START_S
        while "To see the GUI" not in comfy.log:
            assert process.poll() is None, comfy.log[-3000:]
            assert time.monotonic() < deadline, comfy.log[-3000:]
            time.sleep(0.2)
        return comfy

    yield start
    for comfy in started:
        if comfy.process.poll() is None:
            comfy.process.send_signal(signal.SIGTERM)
            try:
                comfy.process.wait(20)
            except subprocess.TimeoutExpired:
                comfy.process.kill()
                comfy.process.wait()


@pytest.fixture(scope="session")
def comfy(start_comfy: Callable[..., Comfy]) -> Comfy:
    """One server for all tests that leave it as they found it."""
    return start_comfy()
