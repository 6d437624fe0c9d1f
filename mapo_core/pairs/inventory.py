"""The files of a pair set and what the linter has found out about each: some bytes per file, whatever their number."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b, file_digest
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from ..errors import PairsError
from .bias import TRAITS
from .images import TooManyPixelsError, image_size, load_image
from .measure import SIGNATURE, measure
from .pair import IMAGE_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from ..buckets import Size
    from .measure import ImageFacts
    from .pair import PreferencePair

Fault = Literal["missing-image", "too-many-pixels", "unreadable-image"]
FAULTS: tuple[Fault, ...] = ("missing-image", "too-many-pixels", "unreadable-image")

_ENDS = 4096  # bytes of a file's beginning and end that are read with its header
_IN_MEMORY = 100_000  # signatures; those of more images are kept in a file

Item = TypeVar("Item")
Result = TypeVar("Result")


class Inventory:
    """The different files of a set, numbered in the order in which they come.

    Attributes:
        numbers: of each pair's files in the order of `IMAGE_FIELDS`, -1 where it has none, [N, 4] int32.
        sizes: (width, height), upright, pixels; 0 where they are not known, [M, 2] int32.
        identity: equal for files with equal pixels where all images are decoded, else for files with equal bytes,
            [M] uint64.
        fault: 0, or 1 + the place in `FAULTS`, [M] uint8.
        errors: what is wrong with the files that have a fault, of each fault as many as are told.
        slots: place of a decoded image in the measures, -1 for others, [M] int32.
        traits: `bias.TRAITS` of the decoded images, [D, 5] float64.
    """

    def __init__(self, pairs: Iterable[PreferencePair], told: int | None = None) -> None:
        """Number the files.

        Args:
            pairs: the set.
            told: of how many files of each fault the error is kept; None: of all.
        """
        names = array("Q")
        for pair in pairs:
            names.extend(map(_name_hash, (getattr(pair, field) for field in IMAGE_FIELDS)))
        hashes = np.frombuffer(names, np.uint64) if names else np.empty(0, np.uint64)
        there = hashes != 0
        _, first, inverse = np.unique(hashes[there], return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        numbers = np.full(len(hashes), -1, np.int32)
        numbers[there] = place[inverse.reshape(-1)]
        self.numbers: np.ndarray = numbers.reshape(-1, len(IMAGE_FIELDS))
        self._first: np.ndarray = np.flatnonzero(there)[first[order]]  # 4 x pair + field
        count = len(order)
        self.sizes = np.zeros((count, 2), np.int32)
        self.identity = np.zeros(count, np.uint64)
        self.fault = np.zeros(count, np.uint8)
        self.errors: dict[int, PairsError] = {}
        self._told = told
        self._kept_errors = [0] * len(FAULTS)
        self.slots = np.full(count, -1, np.int32)
        self.traits = np.empty((0, len(TRAITS)))
        self._pixels = np.empty(0, np.uint64)
        self._signatures = _Signatures(0)
        self._whole = np.ones(count, bool)  # `identity` speaks for the whole file

    def __len__(self) -> int:
        """How many files there are."""
        return len(self.identity)

    @property
    def known(self) -> np.ndarray:
        """Which files are images that can be read, as far as was looked, bool [M]."""
        return self.sizes[:, 0] > 0

    def size(self, number: int) -> Size:
        """(width, height) of an image, pixels."""
        width, height = self.sizes[number].tolist()
        return width, height

    def of_pairs(self, wanted: np.ndarray) -> np.ndarray:
        """Which files belong to the wanted pairs; bool [N] -> bool [M]."""
        found = np.zeros(len(self) + 1, bool)
        found[self.numbers[wanted].reshape(-1)] = True  # -1 falls on the last
        return found[:-1]

    def paths(self, pairs: Iterable[PreferencePair], wanted: np.ndarray) -> Iterator[tuple[int, Path]]:
        """Number and path of the wanted files [M], in order, in one way through the pairs."""
        fields = np.zeros(len(self.numbers) * len(IMAGE_FIELDS), bool)
        fields[self._first[wanted]] = True
        masks = np.packbits(fields.reshape(-1, len(IMAGE_FIELDS)), axis=1, bitorder="little")[:, 0].tobytes()
        number = map(int, np.flatnonzero(wanted))  # a list of a million numbers takes forty megabytes
        for pair, mask in zip(pairs, masks, strict=True):
            for k, field in enumerate(IMAGE_FIELDS):
                if mask >> k & 1:
                    yield next(number), getattr(pair, field)

    def scan(self, pairs: Sequence[PreferencePair], advance: Callable[[int], None]) -> None:
        """Read every file's header, and tell files with other bytes apart.

        Args:
            pairs: the set.
            advance: called with 1 for each file, and with 0 now and then while files are compared.
        """
        with ThreadPoolExecutor(_workers()) as pool:
            every = np.ones(len(self), bool)
            for (number, path), found in _ahead(pool, _header, self.paths(pairs, every)):
                if isinstance(found, PairsError):
                    self._note(number, path, found)
                else:
                    self.sizes[number], self.identity[number], self._whole[number] = found
                advance(1)
            known = self.known
            _, inverse, counts = np.unique(self.identity[known], return_inverse=True, return_counts=True)
            alike = np.zeros(len(self), bool)
            alike[known] = counts[inverse.reshape(-1)] > 1
            for (number, path), found in _ahead(pool, _content, self.paths(pairs, alike & ~self._whole)):
                if isinstance(found, PairsError):
                    self._note(number, path, found)
                else:
                    self.identity[number] = found
                advance(0)

    def measure(
        self, pairs: Sequence[PreferencePair], wanted: np.ndarray, resolution: int, advance: Callable[[int], None]
    ) -> None:
        """Decode the wanted images [M] once each, several at a time, and keep their measures.

        Args:
            pairs: the set.
            wanted: which.
            resolution: side of the square training bucket, pixels.
            advance: called with 1 for each.
        """
        count = int(wanted.sum())
        self.slots[wanted] = np.arange(count, dtype=np.int32)
        self.traits = np.empty((count, len(TRAITS)))
        self._pixels = np.empty(count, np.uint64)
        self._signatures = _Signatures(count)
        scanned = bool(self.known.any() or self.fault.any())

        def look(path: Path) -> ImageFacts | PairsError:
            try:
                return measure(load_image(path), resolution)
            except PairsError as error:
                return error

        with ThreadPoolExecutor(_workers()) as pool:
            for (number, path), found in _ahead(pool, look, self.paths(pairs, wanted)):
                slot = self.slots[number]
                if isinstance(found, PairsError):
                    self.slots[number] = -1
                    if not self.fault[number]:
                        self._note(number, path, found)
                else:
                    self.sizes[number] = found.size
                    self.traits[slot] = [trait.value(found) for trait in TRAITS]
                    self._pixels[slot] = int.from_bytes(found.pixels[:8], "big")
                    self._signatures.put(slot, found.signature)
                    if not scanned:
                        self.identity[number] = self._pixels[slot]
                advance(1)

    def same(self, a: int, b: int) -> bool:
        """Whether two images have the same pixels, or where they are not decoded the same bytes."""
        slots = self.slots[[a, b]]
        if (slots >= 0).all():
            return bool(self._pixels[slots[0]] == self._pixels[slots[1]])
        return bool(self.identity[a] == self.identity[b])

    def signatures(self, numbers: Iterable[int]) -> np.ndarray:
        """Signatures of decoded images, float32 [n, 193]."""
        return self._signatures.get(self.slots[list(numbers)].tolist())

    def _note(self, number: int, path: Path, error: PairsError) -> None:
        kind = "too-many-pixels" if isinstance(error, TooManyPixelsError) else "unreadable-image"
        fault = FAULTS.index("missing-image" if not path.exists() else kind)
        self.sizes[number] = 0
        self.fault[number] = 1 + fault
        if self._told is None or self._kept_errors[fault] < self._told:
            self._kept_errors[fault] += 1
            self.errors[number] = error


class _Signatures:
    """Signatures by slot, in memory or, if they are many, in a file."""

    def __init__(self, count: int) -> None:
        self._kept = np.empty((count, SIGNATURE), np.float32) if count <= _IN_MEMORY else None
        self._file = None if self._kept is not None else tempfile.TemporaryFile()  # noqa: SIM115

    def put(self, slot: int, signature: np.ndarray) -> None:
        """Keep one."""
        if self._kept is not None:
            self._kept[slot] = signature
        elif self._file is not None:
            self._file.seek(slot * SIGNATURE * 4)
            self._file.write(signature.astype(np.float32).tobytes())

    def get(self, slots: Sequence[int]) -> np.ndarray:
        """Those of some slots, [n, 193]."""
        if self._kept is not None:
            return self._kept[slots]
        assert self._file is not None
        rows = []
        for slot in slots:
            self._file.seek(slot * SIGNATURE * 4)
            rows.append(np.frombuffer(self._file.read(SIGNATURE * 4), np.float32))
        return np.stack(rows) if rows else np.empty((0, SIGNATURE), np.float32)


def _ahead(
    pool: ThreadPoolExecutor, do: Callable[[Path], Result], items: Iterator[tuple[int, Path]]
) -> Iterator[tuple[tuple[int, Path], Result]]:
    """Items with what `do` makes of their paths, in order; only some are worked on before they are asked for."""
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(do, item[1])))
            if len(waiting) >= 4 * _workers():
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:  # cancelled: what has not begun need not
        for _, future in waiting:
            future.cancel()


def _workers() -> int:
    return min(8, os.cpu_count() or 1)


def _header(path: Path) -> tuple[Size, int, bool] | PairsError:
    """Size in pixels, a hash of length, beginning and end, and whether that is the whole file."""
    try:
        size = image_size(path)
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            digest = blake2b(f"{length} ".encode() + file.read(_ENDS), digest_size=8)
            file.seek(max(_ENDS, length - _ENDS))
            digest.update(file.read(_ENDS))
    except PairsError as error:
        return error
    except OSError as error:
        return PairsError(f"Cannot read {path}: {error.strerror}. Check the file.")
    return size, int.from_bytes(digest.digest(), "big"), length <= 2 * _ENDS


def _content(path: Path) -> int | PairsError:
    try:
        with path.open("rb") as file:
            return int.from_bytes(file_digest(file, lambda: blake2b(digest_size=8)).digest(), "big")
    except OSError as error:
        return PairsError(f"Cannot read {path}: {error.strerror}. Check the file.")


def _name_hash(path: Path | None) -> int:
    """64 bits of a path, by which files are told apart; 0 for none."""
    if path is None:
        return 0
    name = os.path.normcase(path).encode(errors="surrogateescape")
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "big") or 1
