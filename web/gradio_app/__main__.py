"""Entry of `mapo ui`; works when started by its path, from any folder."""

from __future__ import annotations

import sys
from pathlib import Path

# An embedded Python ignores PYTHONPATH and the script's folder, and a script's own folder must not shadow modules.
_HERE = Path(__file__).resolve().parent
sys.path[:] = [str(_HERE.parents[1]), *(p for p in sys.path if Path(p or ".").resolve() != _HERE)]

if __name__ == "__main__":
    from web.gradio_app.server import main

    sys.exit(main(sys.argv[1:]))
