"""Tensors kept on disk under a content hash, in shards, checked when they are looked up."""

from __future__ import annotations

import json
import logging
import time
import uuid
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CacheError
from .runs import fault_point

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

logger = logging.getLogger(__name__)

_FORMAT = "mapo-cache-1"
_STALE_S = 3600.0  # no shard takes an hour to write


@dataclass(frozen=True)
class _Place:
    shard: Path
    checksums: dict[str, int]  # tensor name -> crc32 of its bytes


class DiskCache:
    """A folder of safetensors shards; entries are dictionaries of tensors.

    Shards are written under a temporary name and moved into place, so that readers and a killed writer never leave
    half of one. Several processes may read and add at the same time. A shard that cannot be read is set aside as
    `*.damaged` and its entries count as missing.

    Args:
        folder: where the shards are; created when the first one is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[str, _Place] = {}
        self._seen: set[Path] = set()
        self._open: dict[Path, safe_open] = {}
        self.refresh()

    def refresh(self) -> None:
        """Notice the shards that other processes have added; remove what killed ones left half written."""
        for temporary in self.folder.glob("*.tmp"):
            with suppress(OSError):
                if time.time() - temporary.stat().st_mtime > _STALE_S:
                    temporary.unlink()
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard in self._seen:
                continue
            self._seen.add(shard)
            try:
                with safe_open(shard, framework="pt") as file:
                    metadata = file.metadata() or {}
            except (SafetensorError, OSError) as error:
                self._set_aside(shard, error)
                continue
            if metadata.get("format") != _FORMAT:
                continue
            for key, checksums in json.loads(metadata["entries"]).items():
                self._places[key] = _Place(shard, checksums)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not stored or whose stored bytes are damaged, in order, without repetition."""
        return [key for key in dict.fromkeys(keys) if not self._intact(key)]

    def get(self, key: str) -> dict[str, Tensor]:
        """An entry as it was put, on the CPU.

        Raises:
            KeyError: there is none; ask `missing` first.
        """
        place = self._places[key]
        file = self._file(place.shard)
        return {name: file.get_tensor(f"{key}/{name}") for name in place.checksums}

    def put(self, entries: dict[str, dict[str, Tensor]]) -> None:
        """Write entries as one shard.

        Raises:
            CacheError: the disk refuses.
        """
        if not entries:
            return
        flat = {f"{key}/{name}": t.detach().cpu().contiguous() for key, e in entries.items() for name, t in e.items()}
        checksums = {key: {name: _crc(flat[f"{key}/{name}"]) for name in entry} for key, entry in entries.items()}
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        temporary = shard.with_suffix(".tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fault_point("cache:opened")
            save_file(flat, temporary, metadata={"format": _FORMAT, "entries": json.dumps(checksums)})
            fault_point("cache:written")
            temporary.replace(shard)
            fault_point("cache:replaced")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CacheError(
                f"Cannot write {shard.name} into the cache folder {self.folder}: {error.strerror or error}. Free some "
                "disk space, or set MAPO_HOME to a folder on another disk."
            ) from error
        self._seen.add(shard)
        for key, sums in checksums.items():
            self._places[key] = _Place(shard, sums)

    def _intact(self, key: str) -> bool:
        place = self._places.get(key)
        if place is None:
            return False
        try:
            entry = self.get(key)
        except (SafetensorError, OSError) as error:
            self._set_aside(place.shard, error)
            return False
        if all(_crc(entry[name]) == crc for name, crc in place.checksums.items()):
            return True
        logger.warning("An entry of the cache shard %s is damaged; it is encoded again.", place.shard)
        del self._places[key]
        return False

    def _file(self, shard: Path) -> safe_open:
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt")
        return self._open[shard]

    def _set_aside(self, shard: Path, error: Exception) -> None:
        logger.warning("The cache shard %s cannot be read (%s); its entries are encoded again.", shard, error)
        self._open.pop(shard, None)
        self._places = {key: place for key, place in self._places.items() if place.shard != shard}
        if shard.exists():
            shard.replace(shard.with_suffix(".damaged"))


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)
