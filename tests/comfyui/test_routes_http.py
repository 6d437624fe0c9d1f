"""The routes of a running ComfyUI: what they answer and what they refuse."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytestmark = pytest.mark.comfyui

NAME = "ink wash 家"


@pytest.fixture
def finished(comfy: Any) -> Path:
    """A run with a picture, a checkpoint and a LoRA, as a trainer leaves it."""
    folder = comfy.runs / NAME
    for name in ("requests", "checkpoints/step_00000002", "samples", "export"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": {"path": "demo"}, "training": {"steps": 4}}))
    (folder / "samples" / "step_00000002.png").write_bytes(b"\x89PNG picture")
    (folder / "export" / "ink.safetensors").write_bytes(b"weights")
    events = [
        {"type": "run_started", "step": 0, "steps": 4, "pid": 1, "pid_started": -1.0},
        {"type": "step", "step": 2, "steps": 4, "loss": 0.5, "chosen_mse": 0.2, "rejected_mse": 0.3},
        {"type": "sample_saved", "step": 2, "path": "samples/step_00000002.png"},
        {"type": "run_stopped", "step": 2, "lora": "export/ink.safetensors", "message": "Stopped."},
    ]
    lines = [json.dumps({"v": 1, "time": 1.0, **event}) for event in events]
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def ask(comfy: Any, method: str, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    """Send the path as it stands: other clients resolve '..' before the server sees it."""
    connection = http.client.HTTPConnection(comfy.url.removeprefix("http://"), timeout=60)
    text = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, text, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read()


def run_url(rest: str = "", name: str = NAME) -> str:
    return f"/mapo/runs/{quote(name, safe='')}{rest}"


def test_a_run_is_listed_and_shown(comfy: Any, finished: Path) -> None:
    entry = next(r for r in comfy.get("/mapo/runs")["runs"] if r["name"] == NAME)
    shown = comfy.get(run_url())

    assert (entry["state"], entry["step"], entry["steps"]) == ("stopped", 2, 4)
    assert shown["curve"][0]["margin"] == pytest.approx(0.1)
    assert comfy.get("/mapo/active") == {"active": []}


def test_files_of_a_run(comfy: Any, finished: Path) -> None:
    status, headers, data = ask(comfy, "GET", run_url("/files/samples/step_00000002.png"))
    assert (status, headers["Content-Type"], data) == (200, "image/png", b"\x89PNG picture")

    status, headers, data = ask(comfy, "GET", run_url("/files/export/ink.safetensors"))
    assert (status, headers["Content-Disposition"], data) == (200, "attachment", b"weights")


@pytest.mark.parametrize(
    "path",
    [
        run_url("/files/config.json"),
        run_url("/files/samples/../config.json"),
        run_url("/files/samples/%2e%2e/config.json"),
        run_url("/files/samples/..%2f..%2f..%2f..%2fserver.log"),
        run_url("/files/%2fetc%2fpasswd"),
        run_url("", "../../models"),
        run_url("", ".."),
        run_url("", ".hidden"),
        run_url("", "no such run"),
    ],
)
def test_nothing_else_is_served(comfy: Any, finished: Path, path: str) -> None:
    status, _, data = ask(comfy, "GET", path)
    assert status in (400, 403, 404)
    assert b'"training"' not in data


def test_a_copy_in_the_loras_folder(comfy: Any, finished: Path) -> None:
    status, answer = comfy.post(run_url("/copy"), {})

    assert status == 200, answer
    copy = comfy.base / "models" / "loras" / answer["lora_name"]
    assert copy.read_bytes() == b"weights"
    assert comfy.get(run_url())["lora_copy"] == answer["lora_name"]
    copy.unlink()


@pytest.mark.parametrize(
    ("rest", "body", "status", "message"),
    [
        ("/request", {"verb": "stop"}, 409, "is not being trained"),
        ("/request", {"verb": "explode"}, 400, "can be asked to"),
        ("/request", b"no json", 400, "no JSON object"),
        ("/request", [1], 400, "no JSON object"),
    ],
)
def test_requests_that_cannot_be_met(
    comfy: Any, finished: Path, rest: str, body: Any, status: int, message: str
) -> None:
    found, _, data = ask(comfy, "POST", run_url(rest), body)
    assert found == status
    assert message in json.loads(data)["error"]
    assert list((finished / "requests").iterdir()) == []


def test_deleting_needs_the_name(comfy: Any, finished: Path) -> None:
    status, _, data = ask(comfy, "DELETE", run_url(), {"confirm": "another"})
    assert status == 400
    assert "To delete the run" in json.loads(data)["error"]
    assert finished.is_dir()

    status, _, _ = ask(comfy, "DELETE", run_url(), {"confirm": NAME})
    assert status == 200
    assert not finished.exists()
