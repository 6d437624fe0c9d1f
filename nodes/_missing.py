"""Stand-ins for nodes whose module cannot be imported, so that a workflow says what is missing instead of "unknown"."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from comfy_api.latest import io

METHOD_PREFIX = "MaPOMethod"  # of the nodes that there are for the methods, whose names are not in the source
HERE = Path(__file__).resolve().parent


def stand_ins(module: str, error: Exception) -> list[type[io.ComfyNode]]:
    """A node for each id in the module's source; running it says what to install."""
    ids = node_ids(HERE / f"{module}.py")
    return [_stand_in(node_id, _advice(error)) for node_id in ids]


def node_ids(path: Path) -> list[str]:
    """The node ids in a module's source: all its texts that look like one."""
    texts = [n.value for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Constant)]
    found = [t for t in texts if isinstance(t, str) and re.fullmatch(r"MaPO[A-Z]\w+", t) and t != METHOD_PREFIX]
    return list(dict.fromkeys(found))


def _advice(error: Exception) -> str:
    if not isinstance(error, ImportError):
        return f"The node could not be loaded: {type(error).__name__}: {error}. ComfyUI's log has the whole story."
    name = error.name or "a package"
    requirements = HERE.parent / "requirements.txt"
    return (
        f"{name} is missing or too old ({error}). Install it into ComfyUI's Python and start ComfyUI again: "
        f'"{sys.executable}" -m pip install -r "{requirements}"'
    )


def _stand_in(node_id: str, advice: str) -> type[io.ComfyNode]:
    class Missing(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            return io.Schema(
                node_id=node_id,
                display_name=f"{node_id} (not available)",
                category="MaPO",
                description=advice,
                is_output_node=True,
                inputs=[],
                outputs=[],
            )

        @classmethod
        def execute(cls, **kwargs: object) -> io.NodeOutput:
            raise RuntimeError(advice)

    return Missing
