"""The trainer's page in a process of its own, and a Chromium that looks at it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENTRY = ROOT / "web" / "gradio_app" / "__main__.py"
STAND_IN = Path(__file__).with_name("stand_in.py")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
START_S = 180.0
WAIT_MS = 120_000


@dataclass
class App:
    """A running page, with a home folder of its own."""

    url: str
    home: Path
    process: subprocess.Popen[bytes]
    output: Path

    @property
    def log(self) -> str:
        """What the server printed, and its log."""
        log = self.home / "ui" / "server.log"
        texts = [path.read_text(encoding="utf-8", errors="replace") for path in (self.output, log) if path.exists()]
        return "\n".join(texts)[-6000:]

    def kill(self) -> None:
        """End the server without a word."""
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def start_app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., App]]:
    """Starts servers on free ports: `start_app("--data-root", folder, home=..., env=...)`; ends them and their runs."""
    pytest.importorskip("gradio", reason="install gradio to test the page")
    started: list[App] = []

    def start(
        *options: str,
        home: Path | None = None,
        env: dict[str, str] | None = None,
        entry: Path = ENTRY,
        port: int | None = None,
    ) -> App:
        home = home or tmp_path_factory.mktemp("mapo home ü")
        if port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
        output = tmp_path_factory.mktemp("server") / "output.txt"
        with output.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, str(entry), "--no-browser", "--port", str(port), *options],
                env={**os.environ, "MAPO_HOME": str(home), "PYTHONUNBUFFERED": "1", **(env or {})},
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        app = App(f"http://127.0.0.1:{port}", home, process, output)
        started.append(app)
        deadline = time.monotonic() + START_S
        while "MaPO trainer: http" not in output.read_text(encoding="utf-8", errors="replace"):
            assert process.poll() is None, app.log
            assert time.monotonic() < deadline, app.log
            time.sleep(0.1)
        return app

    yield start
    for app in started:
        if app.process.poll() is None:
            app.process.send_signal(signal.SIGINT)
            try:
                app.process.wait(15)
            except subprocess.TimeoutExpired:
                app.kill()
        end_runs(app.home)


def end_runs(home: Path) -> None:
    """End the queue and every training in a home folder."""
    from mapo_core.runs import attach, list_runs

    for run in list_runs(home):
        if handle := attach(run):
            handle.kill()


@pytest.fixture
def client_of() -> Callable[..., Any]:
    """A program that calls a page's actions: `client_of(app).predict(..., api_name="/start_run")`."""
    client = pytest.importorskip("gradio_client")

    def connect(app: App, **more: Any) -> Any:
        return client.Client(app.url, verbose=False, **more)

    return connect


@pytest.fixture(scope="session")
def app(start_app: Callable[..., App]) -> App:
    """One server for the tests that do not need one of their own."""
    return start_app()


@pytest.fixture(scope="session")
def few(app: App) -> str:
    """A kept set of 12 of the demo's pairs: encoded and measured in a moment."""
    from mapo_core import demo_pairs
    from mapo_core.pairs import write_pairs

    write_pairs(app.home / "sets" / "few" / "pairs.jsonl", demo_pairs("cartoon", home=app.home).pairs[:12])
    return "few"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="install playwright to test the page")
    own = os.environ.get("CHROMIUM") or next((p for p in map(shutil.which, BROWSERS) if p), None)
    if own is None:
        pytest.skip("there is no Chromium on the PATH; set CHROMIUM to one")
    with playwright.sync_playwright() as play:
        started = play.chromium.launch(executable_path=own, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens pages in sessions of their own: `open_page(url, width=390, dark=True)`.

    After the test every page must have stayed on this machine, and no script of it may have failed.
    """
    contexts: list[Any] = []
    elsewhere: list[str] = []
    failures: list[str] = []

    def note(request: Any) -> None:
        if urlsplit(request.url).hostname not in (None, "127.0.0.1", "localhost"):
            elsewhere.append(request.url)

    def open_(url: str, width: int = 1280, height: int = 900, dark: bool = False, wait: bool = True) -> Any:
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light", accept_downloads=True
        )
        contexts.append(context)
        context.set_default_timeout(WAIT_MS)
        page = context.new_page()
        page.on("request", note)
        page.on("pageerror", lambda error: failures.append(f"{error} {error.stack}"))
        page.goto(url, wait_until="domcontentloaded")
        if wait:
            page.locator("#mapo-tabs").get_by_role("tab").first.wait_for()
        return page

    yield open_
    for context in contexts:
        context.close()
    assert elsewhere == []
    assert [text for text in failures if not re.search(r"ResizeObserver|AbortError", text)] == []


@pytest.fixture
def show_tab() -> Callable[[Any, str], None]:
    """Shows a page of the app by its title, also where a narrow screen hides it behind a menu."""

    def show(page: Any, title: str) -> None:
        tabs = page.locator("#mapo-tabs")
        tabs.get_by_role("tab").first.wait_for()  # a page that is loaded again has none at first
        tab = tabs.get_by_role("tab", name=title, exact=True)
        if not tab.first.is_visible():
            tabs.locator(".overflow-menu > button").first.click()
            page.locator(".overflow-dropdown button", has_text=title).first.click()
        else:
            tab.first.click()
        page.locator(f"#tab-{title.lower()}").first.wait_for()

    return show


@pytest.fixture(scope="session")
def quick_app(start_app: Callable[..., App]) -> App:
    """A server whose runs only count, ten steps a second."""
    return start_app(entry=STAND_IN)


@pytest.fixture(scope="session")
def stand_in() -> Path:
    """The page whose runs only count, for servers of one's own."""
    return STAND_IN
