"""Pairs that stay in their file: a set of a million takes eight bytes of memory for each."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from ..errors import PairsError
from .pair import PreferencePair, Problems, absolute, json_lines, open_list, parse_record, record_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

KEPT = 20_000
"""Sets of at most so many pairs are held in memory as they are."""


class PairList(Sequence[PreferencePair]):
    """The pairs of a JSONL file, each read when it is asked for. The file must stay as it is.

    Made by `open_pairs` and `spool_pairs`, which check every line.
    """

    def __init__(self, path: Path, offsets: array[int], state: tuple[int, int], source: str) -> None:
        """Use `open_pairs`.

        Args:
            path: the file; relative image paths start at its folder.
            offsets: where each pair's line begins, bytes.
            state: size and time of the file when the offsets were taken.
            source: of pairs that do not say where they come from.
        """
        self.path = path
        self._offsets = offsets
        self._state = state
        self._source = source
        self._folder = path.absolute().parent

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferencePair]: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | list[PreferencePair]:
        """A pair, or a list of some.

        Raises:
            PairsError: the file is gone, or has changed since it was opened.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        offset = self._offsets[index]
        with self._opened() as file:
            file.seek(offset)
            return self._pair(json.loads(file.readline()))

    def __iter__(self) -> Iterator[PreferencePair]:
        """All pairs, in one reading of the file."""
        return map(self._pair, self._lines())

    def __eq__(self, other: object) -> bool:
        """Whether both have the same pairs in the same order."""
        if not isinstance(other, Sequence) or len(other) != len(self):
            return NotImplemented if not isinstance(other, Sequence) else False
        return all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def records(self) -> Iterator[dict[str, Any]]:
        """The fields of all pairs as the file has them, several times as quick as the pairs themselves."""
        return self._lines()

    def path_of(self, name: str) -> str:
        """The absolute path of an image that a record names."""
        return str(self._folder / name)

    def _lines(self) -> Iterator[dict[str, Any]]:
        with self._opened() as file:
            for _, _, record in json_lines(self.path, file):
                assert isinstance(record, dict), "open_pairs has seen that it is one"
                yield record

    def _pair(self, record: dict[str, Any]) -> PreferencePair:
        pair = absolute(PreferencePair.model_validate(record), self._folder)
        return pair if pair.source or not self._source else pair.model_copy(update={"source": self._source})

    def _opened(self) -> Any:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise PairsError(f"Cannot read {self.path}: {error.strerror}. It was there before.") from error
        if _state(file) != self._state:
            file.close()
            raise PairsError(f"{self.path} has changed since it was read. Read it again.")
        return file


def _state(file: Any) -> tuple[int, int]:
    found = os.fstat(file.fileno())
    return found.st_size, found.st_mtime_ns


def open_pairs(path: Path, source: str = "") -> PairList:
    """Check JSONL, one pair per line, and leave the pairs in the file.

    Whether the images exist is for `lint_pairs` to say.

    Args:
        path: the file; image paths are relative to its folder.
        source: where pairs come from that do not say it.

    Raises:
        PairsError: the file cannot be read, or lines are wrong; `problems` has them with line numbers.
    """
    offsets, problems = array("q"), Problems(path)
    with open_list(path) as file:
        state = _state(file)
        for number, offset, record in json_lines(path, file):
            pair = parse_record(record)
            if isinstance(pair, list):
                problems.add(number, pair)
            else:
                offsets.append(offset)
    problems.tell()
    return PairList(path, offsets, state, source)


def load_pairs(path: Path) -> Sequence[PreferencePair]:
    """The pairs of a JSONL file as a list if they are few, else left in the file; as `open_pairs`."""
    found = open_pairs(path)
    return found if len(found) > KEPT else list(found)


def spool_pairs(pairs: Iterable[PreferencePair], path: Path, kept: int = KEPT) -> Sequence[PreferencePair]:
    """Pairs as a list if they are few, else as a file that is read when they are asked for.

    Args:
        pairs: any number.
        path: the file to write in that case; it is replaced.
        kept: up to so many are a list.

    Raises:
        PairsError: the disk refuses.
    """
    waiting = iter(pairs)
    first: list[PreferencePair] = []
    for pair in waiting:
        first.append(pair)
        if len(first) > kept:
            break
    else:
        return first
    offsets, offset = array("q"), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("wb", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            for part in (first, waiting):
                for pair in part:
                    offsets.append(offset)
                    offset += file.write(record_line(pair).encode())
            file.flush()
            state = _state(file)
        Path(file.name).replace(path)
    except OSError as error:
        raise PairsError(f"Cannot write {path}: {error.strerror}. Check the folder and its free space.") from error
    return PairList(path, offsets, state, "")
