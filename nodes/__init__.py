"""The ComfyUI nodes: thin. Each converts what ComfyUI gives, calls mapo_core, and converts what comes back."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from comfy_api.latest import ComfyExtension, io

# In the order of the "MaPO" menu: the module of each, and the nodes in it.
MODULES = ("pairs", "pair_sets", "settings", "train", "lora", "results", "demo")

logger = logging.getLogger(__name__)


class MaPOExtension(ComfyExtension):
    """What ComfyUI asks of a pack."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All nodes; those whose module cannot be imported are there too, and say why when they are run."""
        return all_nodes()


def all_nodes() -> list[type[io.ComfyNode]]:
    """The node classes."""
    from .. import mapo_core
    from . import _comfy

    _comfy.set_home()
    for name in mapo_core.__all__:
        if name.endswith("Error"):
            getattr(mapo_core, name).__module__ = "MaPO"  # ComfyUI shows it before the message; it is a long path
    try:
        from . import _routes  # noqa: F401  registers the routes
    except Exception:
        logger.exception("MaPO: the runs tab and the live charts are off, because the routes could not be registered")
    found: list[type[io.ComfyNode]] = []
    for name in MODULES:
        try:
            found += importlib.import_module(f".{name}", __name__).NODES
        except Exception as error:  # the other nodes are not to suffer
            from ._missing import stand_ins

            logger.warning("MaPO: the nodes of %s are off", name, exc_info=error)
            found += stand_ins(name, error)
    return found


def extension() -> Any:
    """The pack's entry, called by the root's `comfy_entrypoint`."""
    return MaPOExtension()
