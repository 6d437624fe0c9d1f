"""Stand-ins for nodes whose module cannot be imported, so that a workflow says what is missing instead of "unknown"."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

from comfy_api.latest import io

HERE = Path(__file__).resolve().parent


def stand_ins(module: str, error: ImportError) -> list[type[io.ComfyNode]]:
    """A node for each id in the module's source; running it says what to install."""
    ids = node_ids(HERE / f"{module}.py")
    return [_stand_in(node_id, _advice(error)) for node_id in ids]


def node_ids(path: Path) -> list[str]:
    """The node ids that a module's source gives to `io.Schema` as plain text."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        word.value.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for word in call.keywords
        if word.arg == "node_id" and isinstance(word.value, ast.Constant) and isinstance(word.value.value, str)
    ]


def _advice(error: ImportError) -> str:
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
