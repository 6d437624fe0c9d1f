"""ComfyUI's entry to this folder. Nothing is imported at the top: pytest reads this file too, without ComfyUI."""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./web/comfyui"


async def comfy_entrypoint() -> Any:
    """The extension with the nodes; the first thing that ComfyUI calls."""
    import logging

    try:
        from .nodes import extension

        return extension()
    except Exception:
        logging.exception("MaPO could not be loaded")  # ComfyUI itself logs one line without a traceback
        raise
