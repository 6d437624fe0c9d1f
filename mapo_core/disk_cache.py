"""Tensors kept on disk under a content hash, in shards, checked when they are looked up."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
import zlib
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .cache_files import FORMAT
from .errors import CacheError
from .runs import fault_point

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

logger = logging.getLogger(__name__)

_STALE_S = 3600.0  # no shard takes an hour to write
_OPEN_SHARDS = 32
_UNSORTED = 50_000  # entries that are added to the index at a time

Checksums = dict[str, dict[str, int]]  # key -> tensor name -> crc32 of its bytes


class CacheIndex:
    """In which shards keys are: 20 bytes for each, whatever their length. A key may be in several."""

    def __init__(self) -> None:
        self._high = np.empty(0, np.uint64)  # sorted: first half of a key's hash
        self._low = np.empty(0, np.uint64)
        self._shards = np.empty(0, np.uint32)
        self._recent: dict[tuple[int, int], list[int]] = {}
        self._recent_count = 0

    def add(self, key: str, shard: int) -> None:
        """Note that a key is in a shard."""
        self._recent.setdefault(_halves(key), []).append(shard)
        self._recent_count += 1
        if self._recent_count >= _UNSORTED:
            self._merge()

    def find(self, key: str) -> Iterator[int]:
        """The shards that hold a key, those noted last first."""
        high, low = _halves(key)
        yield from reversed(self._recent.get((high, low), ()))
        place = int(np.searchsorted(self._high, np.uint64(high)))
        while place < len(self._high) and int(self._high[place]) == high:
            if int(self._low[place]) == low:
                yield int(self._shards[place])
            place += 1

    def _merge(self) -> None:
        new = [(high, low, shard) for (high, low), shards in self._recent.items() for shard in reversed(shards)]
        columns = [np.array([entry[i] for entry in new], np.uint64) for i in range(3)]
        high = np.concatenate([columns[0], self._high])
        order = np.argsort(high, kind="stable")  # of equal ones the new come first
        self._high = high[order]
        self._low = np.concatenate([columns[1], self._low])[order]
        self._shards = np.concatenate([columns[2].astype(np.uint32), self._shards])[order]
        self._recent, self._recent_count = {}, 0


def _halves(key: str) -> tuple[int, int]:
    digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


class DiskCache:
    """A folder of safetensors shards; entries are dictionaries of tensors.

    Shards are written under a temporary name and moved into place, so that readers and a killed writer never leave
    half of one. Several processes may read and add at the same time. A shard that cannot be read is set aside as
    `*.damaged` and its entries count as missing.

    Args:
        folder: where the shards are; created when the first one is written.
        about: what entries that are added here belong to, for people: model, what is encoded, precision.
    """

    def __init__(self, folder: Path, about: dict[str, str] | None = None) -> None:
        self.folder = folder
        self._about = json.dumps(about or {})
        self._index = CacheIndex()
        self._shards: list[Path] = []
        self._numbers: dict[Path, int] = {}
        self._damaged: set[tuple[str, int]] = set()  # entries of readable shards whose bytes are not what they were
        self._gone: set[int] = set()
        self._used: set[int] = set()
        self._open: OrderedDict[int, tuple[safe_open, Checksums]] = OrderedDict()
        self.refresh()

    def refresh(self) -> None:
        """Notice the shards that other processes have added; remove what killed ones left half written."""
        for temporary in self.folder.glob("*.tmp"):
            with suppress(OSError):
                if time.time() - temporary.stat().st_mtime > _STALE_S:
                    temporary.unlink()
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard in self._numbers:
                continue
            number = self._number(shard)
            try:
                checksums = read_checksums(shard)
            except (SafetensorError, OSError) as error:
                self._set_aside(number, error)
                continue
            for key in checksums or ():
                self._index.add(key, number)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """The keys that are not stored or whose stored bytes are damaged, in order, without repetition."""
        return [key for key in dict.fromkeys(keys) if not self._intact(key)]

    def get(self, key: str) -> dict[str, Tensor]:
        """An entry as it was put, on the CPU.

        Raises:
            KeyError: there is none; ask `missing` first.
        """
        for number in self._places(key):
            return self._read(key, number)[0]
        raise KeyError(key)

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
        metadata = {"format": FORMAT, "entries": json.dumps(checksums), "about": self._about}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fault_point("cache:opened")
            save_file(flat, temporary, metadata=metadata)
            fault_point("cache:written")
            temporary.replace(shard)
            fault_point("cache:replaced")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise CacheError(
                f"Cannot write {shard.name} into the cache folder {self.folder}: {error.strerror or error}. Free some "
                "disk space, or set MAPO_HOME to a folder on another disk."
            ) from error
        number = self._number(shard)
        self._used.add(number)
        for key in checksums:
            self._index.add(key, number)

    def shards_used(self) -> list[str]:
        """Names of the shards that were read or written, so that a run can say which of them it needs."""
        return sorted(self._shards[number].name for number in self._used - self._gone)

    def _number(self, shard: Path) -> int:
        self._numbers[shard] = len(self._shards)
        self._shards.append(shard)
        return len(self._shards) - 1

    def _places(self, key: str) -> Iterator[int]:
        return (n for n in self._index.find(key) if n not in self._gone and (key, n) not in self._damaged)

    def _intact(self, key: str) -> bool:
        for number in list(self._places(key)):
            try:
                entry, checksums = self._read(key, number)
            except (SafetensorError, OSError) as error:
                self._set_aside(number, error)
                continue
            if all(_crc(entry[name]) == crc for name, crc in checksums.items()):
                return True
            logger.warning("An entry of the cache shard %s is damaged; it is encoded again.", self._shards[number])
            self._damaged.add((key, number))
        return False

    def _read(self, key: str, number: int) -> tuple[dict[str, Tensor], dict[str, int]]:
        file, checksums = self._file(number)
        return {name: file.get_tensor(f"{key}/{name}") for name in checksums[key]}, checksums[key]

    def _file(self, number: int) -> tuple[safe_open, Checksums]:
        """An open shard; of many the one used longest ago is closed, because a system allows only so many."""
        if number not in self._open:
            file = safe_open(self._shards[number], framework="pt")
            self._open[number] = (file, json.loads((file.metadata() or {}).get("entries", "{}")))
            self._used.add(number)
            with suppress(OSError):  # when it was last used; another user's cache may be read, not written
                os.utime(self._shards[number])
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _set_aside(self, number: int, error: Exception) -> None:
        shard = self._shards[number]
        logger.warning("The cache shard %s cannot be read (%s); its entries are encoded again.", shard, error)
        self._open.pop(number, None)
        self._gone.add(number)
        if shard.exists():
            shard.replace(shard.with_suffix(".damaged"))


def read_checksums(shard: Path) -> Checksums | None:
    """The entries of a shard: key -> tensor name -> crc32; None if the file is none of ours.

    Raises:
        SafetensorError, OSError: it cannot be read.
    """
    with safe_open(shard, framework="pt") as file:
        metadata = file.metadata() or {}
    return json.loads(metadata["entries"]) if metadata.get("format") == FORMAT else None


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)
