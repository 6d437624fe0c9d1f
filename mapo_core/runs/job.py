"""A piece of work in a process of its own: sampling, measuring, exporting. Its memory is given back when it ends.

The child is `mapo_core/__main__.py job <name>`. It reads its arguments as one JSON line from standard input, which
stays open: when it closes, the child ends. It answers with JSON lines: progress, then a result or an error.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

from ..errors import MapoError, RunError
from .launch import MAIN, creation_flags

_POLL_S = 0.1
_END_S = 5.0  # how long a child may take to end by itself
_TAIL_LINES = 20


class JobStoppedError(MapoError):
    """The work was stopped before its end; what it had finished is kept where the work keeps such things."""


def run_job(
    name: str,
    arguments: dict[str, Any],
    *,
    progress: Callable[[str, int, int], object] = lambda what, done, total: None,
    should_stop: Callable[[], bool] = lambda: False,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Do one job in a child process and wait for its result.

    Args:
        name: key of `mapo_core.jobs.JOBS`.
        arguments: what the job takes; anything that JSON can hold.
        progress: called from this thread with what is being done, how much of it is done, and of how much.
        should_stop: asked about ten times a second; True ends the child.
        env: variables on top of this process's own.

    Returns:
        What the job gives back.

    Raises:
        JobStoppedError: `should_stop` said so.
        MapoError: the job failed; of the class that the child raised where it is one of ours.
    """
    inherited = {"PYTHONNOUSERSITE": "1"} if sys.flags.no_user_site else {}
    try:
        child = subprocess.Popen(
            [sys.executable, str(MAIN), "job", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": "utf-8", **inherited, **(env or {})},
            start_new_session=True,
            creationflags=creation_flags("tied"),
        )
    except OSError as error:
        raise RunError(f"Cannot start a process with {sys.executable}: {error}.") from error
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
    complaints: list[str] = []
    readers = [
        threading.Thread(target=_read_messages, args=(child.stdout, messages), daemon=True),
        threading.Thread(target=_keep_tail, args=(child.stderr, complaints), daemon=True),
    ]
    for reader in readers:
        reader.start()
    try:
        with contextlib.suppress(BrokenPipeError):  # it has died already; what it said comes below
            child.stdin.write(json.dumps(arguments).encode() + b"\n")
            child.stdin.flush()
        return _answer(name, messages, complaints, progress, should_stop, readers[1])
    finally:
        _end(child)


def _answer(
    name: str,
    messages: queue.Queue[dict[str, Any] | None],
    complaints: list[str],
    progress: Callable[[str, int, int], object],
    should_stop: Callable[[], bool],
    listener: threading.Thread,
) -> dict[str, Any]:
    while True:
        if should_stop():
            raise JobStoppedError(f"Stopped: {name.replace('_', ' ')}. What was finished is kept.")
        try:
            message = messages.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if message is None:
            listener.join(1.0)
            last = next((line for line in reversed(complaints) if line.strip()), "it said nothing")
            raise RunError(f"The process for {name!r} ended without a result: {last}")
        if "progress" in message:
            progress(*message["progress"])
        elif "error" in message:
            raise _as_error(message)
        elif "result" in message:
            return message["result"]


def _as_error(message: dict[str, Any]) -> MapoError:
    from .. import errors

    kind = getattr(errors, str(message.get("kind")), MapoError)
    known = isinstance(kind, type) and issubclass(kind, MapoError)
    return (kind if known else MapoError)(message["error"])


def _read_messages(pipe: Any, messages: queue.Queue[dict[str, Any] | None]) -> None:
    for line in pipe:
        with contextlib.suppress(ValueError):
            message = json.loads(line)
            if isinstance(message, dict):
                messages.put(message)
    messages.put(None)


def _keep_tail(pipe: Any, lines: list[str]) -> None:
    for line in pipe:
        lines.append(line.decode("utf-8", errors="replace").rstrip())
        del lines[:-_TAIL_LINES]


def _end(child: subprocess.Popen[bytes]) -> None:
    """Let the child go: closing its standard input tells it, and what does not listen is killed."""
    with contextlib.suppress(OSError):
        child.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    for pipe in (child.stdout, child.stderr):
        with contextlib.suppress(OSError):
            pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
