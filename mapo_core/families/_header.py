"""Read the header of a safetensors file, and say what a file is that has none."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from pathlib import Path

_PICKLES = {".ckpt", ".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `start` and `end` are bytes from the file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Names, types and shapes of all tensors, without reading one.

    Raises:
        ModelError: the file is a pickle, is not safetensors, or is cut off.
    """
    if path.suffix.lower() in _PICKLES:
        raise ModelError(_pickle(path))
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(200)
            length = int.from_bytes(start[:8], "little")
            if size < 8 or not 2 <= length <= 100_000_000 or start[8:9] != b"{":
                raise ModelError(_not_safetensors(path, start, size))
            file.seek(8)
            text = file.read(length)
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror}. Check the file and its permissions.") from error
    if len(text) < length:
        raise ModelError(_cut_off(path, size, 8 + length))
    try:
        entries = json.loads(text)
        metadata = entries.pop("__metadata__", {})
        offset = 8 + length
        tensors = {
            name: Entry(e["dtype"], tuple(e["shape"]), *(offset + o for o in e["data_offsets"]))
            for name, e in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has a damaged safetensors header ({error}). Download it again.") from error
    needed = max((e.end for e in tensors.values()), default=8 + length)
    if size < needed:
        raise ModelError(_cut_off(path, size, needed))
    return Header(tensors, metadata)


def _pickle(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run code when it is opened, so it is not read. Get the .safetensors file of "
        "the same model, or convert it: in ComfyUI, Load Checkpoint followed by Save Checkpoint."
    )


def _cut_off(path: Path, size: int, needed: int) -> str:
    return (
        f"{path} is cut off: it has {size / 1e6:.1f} MB of at least {needed / 1e6:.1f} MB. The download or copy was "
        "not finished; get the file again."
    )


def _not_safetensors(path: Path, start: bytes, size: int) -> str:
    if size == 0:
        return f"{path} is empty. Download it again."
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a Git LFS pointer, not the model. Run `git lfs pull` in its folder, or download the file."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return (
            f"{path} is a web page saved as a model: the download ended at a login or error page. Open the link in a "
            "browser, sign in if it asks, and download the file again."
        )
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")):
        return _pickle(path)
    if start.startswith(b"GGUF"):
        return f"{path} is a GGUF file, whose weights are quantised and cannot be trained on. Use a safetensors file."
    return f"{path} is not a safetensors file (it begins with {start[:8]!r}). Download it again."
