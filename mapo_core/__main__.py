"""Entry of the command line and of the training child; works when started by its path, from any folder."""

from __future__ import annotations

import sys
from pathlib import Path

# An embedded Python ignores PYTHONPATH and the script's folder, and a script's own folder must not shadow modules.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parent), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

if __name__ == "__main__":
    from mapo_core.cli import main

    sys.exit(main())
