"""Copies of LoRA files for other programs, such as ComfyUI's `models/loras`; no file is ever replaced."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
from pathlib import Path

from .errors import ExportError


def copy_lora(path: Path, folder: Path, name: str | None = None) -> Path:
    """Copy a LoRA into a folder.

    A file with the same content is left as it is; no other file is ever replaced, not even an earlier copy of the
    same run: a program that keeps what it has loaded by name would not notice.

    Args:
        path: the LoRA.
        folder: where to; it is made if it is missing.
        name: stem of the copy; None: as the file is called.

    Returns:
        The copy: `name`, or `name-2`, `name-3` and so on where that is taken by another file.

    Raises:
        ExportError: the LoRA is not there, or the folder cannot be written.
    """
    stem = name or path.stem
    try:
        if not path.is_file():
            raise ExportError(f"There is no LoRA file {path}. Train the run to its end, or export a checkpoint.")
        folder.mkdir(parents=True, exist_ok=True)
        number, target = 1, folder / f"{stem}{path.suffix}"
        while target.exists() and not _same(target, path):
            number += 1
            target = folder / f"{stem}-{number}{path.suffix}"
        if not target.exists():
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                shutil.copyfile(path, temporary)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ExportError(f"Cannot copy {path.name} into {folder}: {error.strerror}. Choose another folder.") from error
    return target


def find_lora_copy(path: Path, folder: Path) -> Path | None:
    """A file in a folder with the same content, or None."""
    for target in sorted(folder.glob(f"*{path.suffix}")) if path.exists() else []:
        if _same(target, path):
            return target
    return None


def _same(one: Path, other: Path) -> bool:
    a, b = one.stat(), other.stat()
    return a.st_size == b.st_size and _sha256(one, a.st_size, a.st_mtime_ns) == _sha256(other, b.st_size, b.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _sha256(path: Path, size: int, modified: int) -> str:
    """Hash of a file, read once for each size and time that it had."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
