"""Stand-in for the process of a job: does what its arguments say, and answers as `mapo_core.jobs` does."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any


def say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def leave_with_parent() -> None:
    while sys.stdin.buffer.raw.read(1):  # type: ignore[attr-defined]
        pass
    os._exit(75)


def main() -> int:
    line = b""
    while not line.endswith(b"\n"):
        line += sys.stdin.buffer.raw.read(1)  # type: ignore[attr-defined]
    given = json.loads(line)
    say(progress=["starting", 0, 2])
    print("a library that prints", flush=True)
    if given.get("crash"):
        print("Traceback\nMemoryError: no memory left", file=sys.stderr, flush=True)
        os._exit(3)
    if given.get("error"):
        say(error="Pair 3: image is missing", kind=given["error"])
        return 1
    if given.get("forever"):
        if not given.get("deaf"):
            threading.Thread(target=leave_with_parent, daemon=True).start()
        say(progress=[str(os.getpid()), 1, 2])
        time.sleep(600)
    say(progress=["done", 2, 2])
    say(result={"given": given, "name": sys.argv[2]})
    return 0


sys.exit(main())
