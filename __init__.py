"""ComfyUI's entry to this folder. Nothing is imported at the top: pytest reads this file too, without ComfyUI."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """An extension without nodes, so that ComfyUI does not report the folder as broken."""
    import logging

    from comfy_api.latest import ComfyExtension  # pyright: ignore[reportMissingImports]

    class MaPOExtension(ComfyExtension):
        async def get_node_list(self) -> list[type]:
            return []

    logging.info("MaPO: the ComfyUI nodes are not part of this version; use the command line (README.md).")
    return MaPOExtension()
