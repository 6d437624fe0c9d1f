"""What CI runs: format, lint, types and the default tests. All of it runs, whatever fails first.

Arguments go to pytest: `mapo test tests/methods -x`, `mapo test -m slow`. Without any, all default tests run in as many
processes as the machine has cores, at most four; `mapo test -n 0` runs them one after the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MOST_PROCESSES = 4  # each takes up to two gigabytes


def main(arguments: list[str]) -> int:
    """Run the checks; 0 when all passed."""
    if arguments[:1] == ["test"]:  # mapo.bat cannot drop its first word
        arguments = arguments[1:]
    checks = {
        "format": ["ruff", "format", "--check", "."],
        "lint": ["ruff", "check", "."],
        "types": ["basedpyright", "--pythonpath", sys.executable],
        "tests": ["pytest", *(arguments or parallel(os.cpu_count() or 1))],
    }
    # Each process computes on one core, be it a test's or one that a test starts.
    environment = {**os.environ, **({} if arguments else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})}
    results = []
    for name, command in checks.items():
        print(f"== {name}", flush=True)
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, check=False)
        passed = done.returncode == 0
        results.append((name, passed, time.monotonic() - start))
    print("== summary")
    for name, passed, seconds in results:
        print(f"{name:8} {'passed' if passed else 'FAILED'} in {seconds:.1f} s")
    return 0 if all(passed for _, passed, _ in results) else 1


def parallel(cores: int) -> list[str]:
    """Options of pytest-xdist; the tests of a file stay in one process, so that they share what they prepare."""
    return ["-n", str(min(cores, MOST_PROCESSES)), "--dist", "loadfile"] if cores > 1 else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
