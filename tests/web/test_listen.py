"""The page with --listen: the password, and what cannot be read with it either."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

PASSWORD = "a long enough one"
AUTH = ("mapo", PASSWORD)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that may be read, with links out of it, beside one that may not."""
    from PIL import Image

    house = tmp_path_factory.mktemp("house")
    for place in ("data", "private"):
        for side in ("chosen", "rejected"):
            (house / place / side).mkdir(parents=True)
            Image.new("RGB", (64, 64), (90, 90, 200)).save(house / place / side / "a.png")
    (house / "data" / "way out").symlink_to(house / "private", target_is_directory=True)
    (house / "data" / "linked").mkdir()
    for side in ("chosen", "rejected"):
        (house / "data" / "linked" / side).mkdir()
        (house / "data" / "linked" / side / "a.png").symlink_to(house / "private" / side / "a.png")
    (house / "private" / "secret.yaml").write_text("secret: 1")
    return house / "data"


@pytest.fixture(scope="module")
def listening(start_app: Any, data: Path) -> Any:
    return start_app("--listen", "--data-root", str(data), env={"MAPO_PASSWORD": PASSWORD})


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_without_the_password(listening: Any) -> None:
    client = pytest.importorskip("gradio_client")
    for path in ("/config", "/gradio_api/info", "/gradio_api/file=/etc/passwd", "/gradio_api/openapi.json"):
        assert status(listening.url + path) in (401, 403), path
    for auth in (None, ("mapo", "wrong"), ("root", PASSWORD)):
        with pytest.raises(Exception):  # noqa: B017, PT011  of several libraries
            client.Client(listening.url, auth=auth, verbose=False).predict(api_name="/list_runs")
    assert client.Client(listening.url, auth=AUTH, verbose=False).predict(api_name="/list_runs") == []


def test_with_the_password_only_the_named_folders(listening: Any, data: Path) -> None:
    client = pytest.importorskip("gradio_client").Client(listening.url, auth=AUTH, verbose=False)
    outside = data.parent / "private"
    for pairs in (outside, data / "way out", data / ".." / "private", f"file://{data}", "/etc"):
        with pytest.raises(Exception, match=r"may read|is an address"):
            client.predict("x", "demo", str(pairs), "", api_name="/start_run")
    with pytest.raises(Exception, match="may read"):  # the folder may be read, its links lead elsewhere
        client.predict("x", "demo", str(data / "linked"), "", api_name="/start_run")
    for settings in (f"model: {{vae: '{outside / 'secret.yaml'}'}}", "model: {vae: 'file:///etc/passwd'}"):
        with pytest.raises(Exception, match=r"may read|is an address"):
            client.predict("x", "demo", "demo", settings, api_name="/start_run")
    with pytest.raises(Exception, match="may read"):
        client.predict("x", str(outside / "model.safetensors"), "demo", "", api_name="/start_run")
    assert client.predict(api_name="/list_runs") == []


def test_gradios_own_routes(listening: Any, data: Path) -> None:
    cookies = pytest.importorskip("httpx").Client(base_url=listening.url, timeout=60)
    assert cookies.post("/login", data={"username": "mapo", "password": PASSWORD}).status_code == 200
    assert cookies.get("/config").status_code == 200
    for path in (
        data / "chosen" / "a.png",  # shown as small copies only
        data.parent / "private" / "secret.yaml",
        "/etc/passwd",
        "../../etc/passwd",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
    ):
        for route in ("/gradio_api/file=", "/gradio_api/file/"):
            assert cookies.get(route + quote(str(path))).status_code in (403, 404), path
    assert cookies.get("/gradio_api/proxy=http://127.0.0.1:1/").status_code == 403
    runs = listening.home / "runs"
    (runs / "ok.png").write_bytes(b"png")
    (runs / "out.png").symlink_to(data / "chosen" / "a.png")
    answer = cookies.get(f"/gradio_api/file={quote(str(runs / 'ok.png'))}")
    assert answer.status_code == 200
    assert "sandbox" in answer.headers["content-security-policy"]
    assert cookies.get(f"/gradio_api/file={quote(str(runs / 'out.png'))}").status_code == 403


def test_without_a_password_it_does_not_listen(tmp_path: Path) -> None:
    entry = Path(__file__).resolve().parents[2] / "web" / "gradio_app" / "__main__.py"
    env = {name: text for name, text in os.environ.items() if name != "MAPO_PASSWORD"} | {"MAPO_HOME": str(tmp_path)}
    for more, words in (([], "needs a password"), (["--password", "short"], "8 characters")):
        answer = subprocess.run(
            [sys.executable, str(entry), "--listen", *more],
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        assert answer.returncode == 2
        assert words in answer.stderr


def test_the_login_page(listening: Any, open_page: Callable[..., Any]) -> None:
    page = open_page(listening.url, wait=False)
    page.get_by_label("username").fill("mapo")
    page.get_by_label("password").fill(PASSWORD)
    page.get_by_role("button", name="Login").click()
    page.locator("#mapo-tabs").wait_for()
