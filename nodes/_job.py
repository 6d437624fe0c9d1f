"""Work in a child process, with a node's progress bar; Cancel ends it."""

from __future__ import annotations

from typing import Any

from ..mapo_core.runs import JobStoppedError, run_job
from . import _comfy


def job(name: str, arguments: dict[str, Any], bar: _comfy.Progress) -> dict[str, Any]:
    """Do a job of `mapo_core.jobs` and give its result.

    Raises:
        Exception: ComfyUI's own for an interruption, once the child has ended.
        MapoError: what went wrong.
    """
    _comfy.require_packages()
    _comfy.free_vram()
    try:
        return run_job(
            name, arguments, progress=lambda _, done, total: bar.show(done, total), should_stop=bar.cancelled
        )
    except JobStoppedError:
        assert bar.stop is not None  # nothing else stops it
        raise bar.stop from None
