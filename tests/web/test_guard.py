"""What the server refuses: files by any trick, other machines' addresses, strangers' hosts, large uploads."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from web.gradio_app.guard import Guard

SECRET = "hands off"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A served folder with a picture and links, and a secret beside it."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "a picture ü.png").write_bytes(b"png")
    (tmp_path / "secret.txt").write_text(SECRET)
    (served / "link.png").symlink_to(tmp_path / "secret.txt")
    (served / "inner").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "served too").mkdir()
    (tmp_path / "served too" / "x.png").write_bytes(b"png")
    return served


def ask(guard: Guard, path: str, **headers: str) -> int:
    """The status of an answer; 200 is the app behind the guard."""
    said: list[dict[str, Any]] = []
    fields = {"host": "127.0.0.1:7860", **{name.replace("_", "-"): text for name, text in headers.items()}}
    scope = {
        "type": "http",
        "method": "POST" if path.endswith(("/login", "/upload")) else "GET",
        "path": path,
        "client": ("10.0.0.9", 1),
        "headers": [(name.encode(), text.encode()) for name, text in fields.items()],
    }

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    asyncio.run(guard(scope, receive, send))
    return said[0]["status"]


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def guard_of(house: Path, listen: bool = False) -> Guard:
    return Guard(behind, served=[house], listen=listen, max_upload_bytes=1000)


@pytest.mark.parametrize("route", ["/gradio_api/file=", "/file=", "/gradio_api/file/"])
def test_only_served_files_are_fetched_wherever_links_lead(house: Path, route: str) -> None:
    guard = guard_of(house)
    assert ask(guard, f"{route}{house / 'a picture ü.png'}") == 200
    for name in (
        house.parent / "secret.txt",
        house / "link.png",
        house / "inner" / "secret.txt",
        house / ".." / "secret.txt",
        house.parent / "served too" / "x.png",
        house,
        house / "missing.png",
        "a picture ü.png",
        "/etc/passwd",
        f"file://{house.parent / 'secret.txt'}",
        "http://example.com/x.png",
        quote(f"{house}/../secret.txt", safe=""),
        quote(quote(f"{house}/../secret.txt", safe=""), safe=""),
        f"{house}/a picture ü.png\x00.txt",
    ):
        assert ask(guard, f"{route}{name}") == 403, name


def test_nothing_is_fetched_for_a_visitor(house: Path) -> None:
    for path in ("/gradio_api/proxy=https://example.com/", "/gradio_api/vibe-edit/", "/gradio_api/dev/reload"):
        assert ask(guard_of(house, listen=True), path) == 403


def test_a_web_site_that_points_its_name_here_gets_nothing(house: Path) -> None:
    for host in ("127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860"):
        assert ask(guard_of(house), "/", host=host) == 200
    for host in ("evil.example:7860", "127.0.0.1.evil.example", "", "localhost.evil.example:80"):
        assert ask(guard_of(house), "/", host=host) == 403
    assert ask(guard_of(house, listen=True), "/", host="workstation:7860") == 200


def test_uploads_and_bodies_are_limited(house: Path) -> None:
    assert ask(guard_of(house), "/gradio_api/upload", content_length="1000") == 200
    assert ask(guard_of(house), "/gradio_api/upload", content_length="1001") == 413
    assert ask(guard_of(house), "/gradio_api/queue/join", content_length=str(65 * 1024**2)) == 413


def test_a_body_without_a_length_is_cut(house: Path) -> None:
    got: list[Any] = []

    async def reads(scope: Any, receive: Any, send: Any) -> None:
        while (message := await receive())["type"] == "http.request":
            got.append(message)
        await behind(scope, receive, send)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"x" * 400, "more_body": True}

    async def send(message: dict[str, Any]) -> None:
        pass

    guard = Guard(reads, served=[house], listen=False, max_upload_bytes=1000)
    scope = {"type": "http", "method": "POST", "path": "/upload", "headers": [(b"host", b"localhost")]}
    asyncio.run(guard(scope, receive, send))
    assert len(got) == 2


def test_passwords_cannot_be_tried_out(house: Path) -> None:
    guard = guard_of(house, listen=True)
    assert [ask(guard, "/login") for _ in range(12)] == [200] * 10 + [429] * 2
