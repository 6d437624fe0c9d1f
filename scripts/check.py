"""What CI runs: format, lint, types and the default tests. All of it runs, whatever fails first.

Arguments go to pytest: `mapo test tests/methods -x`, `mapo test -m slow`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    """Run the checks; 0 when all passed."""
    if arguments[:1] == ["test"]:  # mapo.bat cannot drop its first word
        arguments = arguments[1:]
    checks = {
        "format": ["ruff", "format", "--check", "."],
        "lint": ["ruff", "check", "."],
        "types": ["basedpyright", "--pythonpath", sys.executable],
        "tests": ["pytest", *arguments],
    }
    results = []
    for name, command in checks.items():
        print(f"== {name}", flush=True)
        start = time.monotonic()
        passed = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode == 0
        results.append((name, passed, time.monotonic() - start))
    print("== summary")
    for name, passed, seconds in results:
        print(f"{name:8} {'passed' if passed else 'FAILED'} in {seconds:.1f} s")
    return 0 if all(passed for _, passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
