"""Silence two import notices that ask for packages we do not use; every other message of the same loggers stays."""

from __future__ import annotations

import logging

_NOTICES = {
    # diffusers names CLIPImageProcessor, of which only the torchvision form is its default; we never process images.
    "transformers.utils.import_utils": "requires torchvision (not installed); falling back to",
    # bitsandbytes looks for a 4-bit kernel of another package; nothing here is 4-bit.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community",
}


def _without(text: str) -> logging.Filter:
    class _Without(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return text not in record.getMessage()

    return _Without(text)


def quiet_import_notices() -> None:
    """Call before the first import of diffusers, peft or bitsandbytes; calling it again does nothing."""
    for name, text in _NOTICES.items():
        logger = logging.getLogger(name)
        if not any(f.name == text for f in logger.filters if isinstance(f, logging.Filter)):
            logger.addFilter(_without(text))
