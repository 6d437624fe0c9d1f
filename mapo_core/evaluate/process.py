"""Run a measuring command in a process of its own, so that a face stays responsive and its memory is given back."""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import errors
from ..errors import MapoError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAIN = Path(__file__).resolve().parents[1] / "__main__.py"
_POLL_S = 0.1
_LAST_LINES = 20


def run_measure(
    arguments: Sequence[str],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    phase: Callable[[str], None] = lambda name: None,
    cancelled: Callable[[], bool] = lambda: False,
    python: str | None = None,
    env: dict[str, str] | None = None,
) -> dict[str, Any] | None:
    """Run `mapo ARGUMENTS --json-lines` as a child that ends with this process.

    Commands that can: mismatch, evaluate, sweep, pairs generate-rejected, pairs synthesize.

    Args:
        arguments: the command and its options, for example ["mismatch", "--pairs", "pairs.jsonl", "--model", "demo"].
        progress: called with what is done and what there is to do.
        phase: called with what is being done.
        cancelled: asked every tenth of a second; the child is ended when it says yes. What it made is kept, and the
            same call goes on from there.
        python: the interpreter; None is this one.
        env: variables on top of this process's own.

    Returns:
        The result as the command's `as_dict()`, or None when it was cancelled.

    Raises:
        MapoError: what the child raised, as the same class; or that it ended without a result.
    """
    process = subprocess.Popen(
        [python or sys.executable, str(MAIN), *arguments, "--json-lines"],
        stdin=subprocess.PIPE,  # the child ends when this closes
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})},
        creationflags=subprocess.CREATE_NO_WINDOW if sys.platform == "win32" else 0,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    complaints: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(process.stdout, lines.put, lines), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, complaints.append, None), daemon=True),
    ]
    for reader in readers:
        reader.start()
    result: dict[str, Any] | None = None
    failure: MapoError | None = None
    try:
        while True:
            if cancelled():
                return None
            try:
                line = lines.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if line is None:
                break
            said = _parse(line)
            if "done" in said:
                progress(said["done"], said["total"])
            elif "phase" in said:
                phase(said["phase"])
            elif "error" in said:
                failure = _error(said["kind"], said["error"])
            elif "result" in said:
                result = said["result"]
        code = process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        for reader in readers:
            reader.join()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
    if failure is not None:
        raise failure
    if result is None:
        said = "".join(complaints[-_LAST_LINES:]).strip() or "nothing"
        raise MapoError(f"mapo {arguments[0]} ended with code {code} and without a result. Its last words: {said}")
    return result


class JsonLines:
    """The child's side: one JSON object per line on standard output."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        sys.stdout = sys.stderr  # what a library prints must not end up between the objects

    def progress(self, done: int, total: int) -> None:
        """How far it is."""
        self._say({"done": done, "total": total})

    def phase(self, name: str) -> None:
        """What is being done."""
        self._say({"phase": name})

    def result(self, values: dict[str, Any]) -> None:
        """The end."""
        self._say({"result": values})

    def error(self, error: MapoError) -> None:
        """Why there is no result."""
        self._say({"error": str(error), "kind": type(error).__name__})

    def _say(self, values: dict[str, Any]) -> None:
        self._stream.write(json.dumps(jsonable(values), ensure_ascii=False) + "\n")
        self._stream.flush()


def jsonable(value: Any) -> Any:
    """The same with null where a number is not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {key: jsonable(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(stream: Any, take: Callable[[str], object], end: queue.Queue[str | None] | None) -> None:
    for line in stream:
        take(line)
    if end is not None:
        end.put(None)


def _parse(line: str) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except ValueError:  # a C library that writes to the descriptor itself
        return {}
    return said if isinstance(said, dict) else {}


def _error(kind: str, message: str) -> MapoError:
    found = getattr(errors, kind, MapoError)
    return found(message) if isinstance(found, type) and issubclass(found, MapoError) else MapoError(message)
