"""What the server refuses before any page sees it: files outside of the served folders, proxies, strangers' hosts."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

_FILE_ROUTES = ("/file=", "/file/")
_REFUSED = ("/proxy=", "/vibe-edit", "/undo-vibe-edit", "/dev/reload", "/run-history", "/process_recording")
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_LOGINS, _LOGIN_WINDOW_S = 10, 60.0
_BODY_BYTES = 64 * 1024**2  # of a request that is not an upload
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    # A file that a browser opens by itself (SVG, HTML) must not act in the app's name.
    (b"content-security-policy", b"sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src 'self' data:"),
]


class Guard:
    """Middleware around gradio's own server.

    - Files are served from the served folders and gradio's own cache alone, judged by where links lead.
    - Nothing is fetched from other machines in a visitor's name.
    - Without --listen the page must be asked for by this machine's own name, so that a web site which points its name
      at 127.0.0.1 gets nothing.
    - Ten attempts to log in per minute and address.
    - Uploads are limited as a whole, not only per file.
    """

    def __init__(
        self, app: Any, *, served: Sequence[Path], listen: bool, max_upload_bytes: int, cache: Sequence[Path] = ()
    ) -> None:
        """Wrap an ASGI app.

        Args:
            app: what is guarded.
            served: folders whose files may be fetched.
            listen: whether other machines may ask.
            max_upload_bytes: of one request that uploads files.
            cache: gradio's folders of uploads and of files that it shows.
        """
        self._app = app
        self._folders = [folder.resolve() for folder in (*served, *cache)]
        self._listen = listen
        self._max_upload_bytes = max_upload_bytes
        self._logins: dict[str, deque[float]] = {}

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]
        headers = dict(scope.get("headers") or [])
        reason = self._reason(scope, path, headers)
        if reason is not None:
            await _refuse(send, *reason)
            return
        if any(route in path for route in _FILE_ROUTES):
            await self._app(scope, receive, _with_headers(send))
            return
        limit = self._max_upload_bytes if path.rstrip("/").endswith("/upload") else _BODY_BYTES
        await self._app(scope, _limited(receive, limit), send)

    def _reason(self, scope: dict[str, Any], path: str, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        """Status and words of a refusal, or None."""
        if not self._listen and not _is_local(headers.get(b"host", b"")):
            return (
                403,
                "This app answers under 127.0.0.1 and localhost only. Start it with --listen for other machines.",
            )
        if any(part in path for part in _REFUSED):
            return 403, "Not available here."
        if path.rstrip("/").endswith("/login") and scope["method"] == "POST" and self._too_many_logins(scope):
            return 429, "Too many attempts to log in. Wait a minute."
        for route in _FILE_ROUTES:
            _, found, name = path.partition(route)
            if found and not self._is_served(name):
                return 403, "This file cannot be fetched."
        limit = self._max_upload_bytes if path.rstrip("/").endswith("/upload") else _BODY_BYTES
        if int(headers.get(b"content-length", b"0") or 0) > limit:
            return 413, f"At most {limit // 1024**2} MB can be sent at once. See --max-upload."
        return None

    def _is_served(self, name: str) -> bool:
        name = unquote(name)  # twice encoded names are refused, not guessed at
        if "\x00" in name or ("%" in name and unquote(name) != name and ".." in unquote(name)):
            return False
        path = Path(name)
        if not path.is_absolute():
            return False
        try:
            real = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return False
        return real.is_file() and any(real.is_relative_to(folder) for folder in self._folders)

    def _too_many_logins(self, scope: dict[str, Any]) -> bool:
        now, client = time.monotonic(), (scope.get("client") or ("?", 0))[0]
        if len(self._logins) > 10_000:
            self._logins.clear()
        times = self._logins.setdefault(client, deque(maxlen=_LOGINS))
        full = len(times) == _LOGINS and now - times[0] < _LOGIN_WINDOW_S
        if not full:
            times.append(now)
        return full


def _is_local(host: bytes) -> bool:
    name = host.decode("latin-1").strip().lower()
    name = name.rpartition("]")[0] + "]" if name.startswith("[") else name.partition(":")[0]
    return name in _LOCAL_HOSTS


def _with_headers(send: Callable[[dict[str, Any]], Awaitable[None]]) -> Callable[[dict[str, Any]], Awaitable[None]]:
    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
        await send(message)

    return sending


def _limited(receive: Callable[[], Awaitable[Any]], limit: int) -> Callable[[], Awaitable[Any]]:
    """End a body that is longer than its sender said, or that has no length."""
    got = 0

    async def receiving() -> Any:
        nonlocal got
        message = await receive()
        if message["type"] == "http.request":
            got += len(message.get("body", b""))
            if got > limit:
                return {"type": "http.disconnect"}
        return message

    return receiving


async def _refuse(send: Callable[[dict[str, Any]], Awaitable[None]], status: int, words: str) -> None:
    body = words.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
