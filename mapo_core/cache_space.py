"""Whether the disk has room for what is about to be encoded."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from .errors import CacheError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SPARE_BYTES = 500_000_000  # left for checkpoints, pictures and the LoRA file


def bytes_of(entries: dict[str, dict[str, Tensor]]) -> int:
    """What entries take on disk."""
    return sum(t.numel() * t.element_size() for entry in entries.values() for t in entry.values())


def check_space(folder: Path, needed: int, what: str) -> None:
    """Stop before encoding if the disk has too little room for it.

    Args:
        folder: of the cache; it need not exist yet.
        needed: by what is missing in the cache, bytes.
        what: is encoded, for the message.

    Raises:
        CacheError: there is too little; the message says how much is needed and what to do.
    """
    if needed == 0:
        return
    free = free_bytes(folder)
    if needed + SPARE_BYTES > free:
        raise CacheError(
            f"The encoded {what} will take {gigabytes(needed)} in {folder}, and only {gigabytes(free)} are free there "
            f"({gigabytes(SPARE_BYTES)} are kept for the run). Set cache.precision to bf16, which halves it, set "
            "MAPO_HOME to a folder on another disk, or make room: `mapo cache` lists what older runs have left."
        )


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder, which need not exist yet."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def gigabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
