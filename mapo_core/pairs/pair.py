"""PreferencePair, and `pairs.jsonl`: one checked pair per line."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from .._settings import Settings
from ..errors import PairsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .findings import Finding

_HASHES = 50_000  # of images that are remembered
_PROBLEMS = 1000  # wrong lines that are told one by one

IMAGE_FIELDS = ("chosen", "rejected", "chosen_mask", "rejected_mask")


class PreferencePair(Settings):
    """Two images for one prompt, of which the first is preferred."""

    prompt: str
    """What the model is given for both images."""
    chosen: Path
    """The preferred image."""
    rejected: Path
    """The other image."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Factor on this pair's loss."""
    rejected_prompt: str | None = None
    """Prompt of the rejected image, for methods that use another one; None: the same."""
    base_prompt: str | None = None
    """Prompt for the reference model, for methods that use another one; None: the same."""
    chosen_score: float | None = Field(default=None, allow_inf_nan=False)
    """Score of the chosen image, for methods that use scores."""
    rejected_score: float | None = Field(default=None, allow_inf_nan=False)
    """Score of the rejected image."""
    chosen_mask: Path | None = None
    """Greyscale image; white where the chosen image counts."""
    rejected_mask: Path | None = None
    """Greyscale image; white where the rejected image counts."""
    source: str = ""
    """Where the pair and its prompt come from, for people: "stem; prompt from cat.txt"."""
    held_out: bool | None = None
    """True: never trained on, only measured with; False: always trained on; None: as the random share decides."""

    @field_validator(*IMAGE_FIELDS)
    @classmethod
    def _names_a_file(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and not value.name:
            raise ValueError("is empty; it must be the path of an image")
        return value


@dataclass(frozen=True)
class PairSet:
    """Pairs as a reader found them.

    Attributes:
        pairs: the complete pairs, in order.
        findings: what was wrong with the rest, and what a person should know.
        counts: number of pairs by where their prompt comes from, and of rows that were left out.
    """

    pairs: Sequence[PreferencePair]
    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def read_pairs(path: Path) -> list[PreferencePair]:
    """Read JSONL, one pair per line, into memory; image paths are relative to the file's folder.

    Whether the images exist is for `lint_pairs` to say. `open_pairs` leaves a large set in its file.

    Raises:
        PairsError: the file cannot be read, or lines are wrong; `problems` has them with line numbers.
    """
    with open_list(path) as file:
        return list(checked_pairs(path, ((number, record) for number, _, record in json_lines(path, file))))


def checked_pairs(
    path: Path, records: Iterable[tuple[int, dict[str, Any] | str]], source: str = ""
) -> Iterator[PreferencePair]:
    """Validate records of a manifest, one after the other.

    Args:
        path: the manifest; relative image paths start at its folder.
        records: (line number, fields), or (line number, what is wrong with the line).
        source: where pairs come from that do not say it.

    Raises:
        PairsError: at the end, if lines are wrong.
    """
    problems = Problems(path)
    folder = path.absolute().parent
    for line, record in records:
        pair = parse_record(record)
        if isinstance(pair, list):
            problems.add(line, pair)
            continue
        pair = absolute(pair, folder)
        yield pair if pair.source or not source else pair.model_copy(update={"source": source})
    problems.tell()


def parse_record(record: dict[str, Any] | str) -> PreferencePair | list[str]:
    """The pair, or all that is wrong with its fields; a text is what is wrong with the line already."""
    if isinstance(record, str):
        return [record]
    try:
        return PreferencePair.model_validate(record)
    except ValidationError as error:
        return [_explain(e) for e in error.errors()]


class Problems:
    """What is wrong with the lines of a manifest; of very many the first thousand are kept."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first: list[str] = []
        self._count = 0

    def add(self, line: int, faults: Sequence[str]) -> None:
        """Note what is wrong with a line."""
        self._count += len(faults)
        self._first += [f"line {line}: {fault}" for fault in faults][: max(0, _PROBLEMS - len(self._first))]

    def tell(self) -> None:
        """Say it, if there is anything.

        Raises:
            PairsError: there is.
        """
        if self._count:
            shown = "; ".join(self._first[:3]) + (f"; and {self._count - 3} more" if self._count > 3 else "")
            raise PairsError(
                f"{self._path} is not a valid list of pairs: {shown}. Correct these lines and read it again.",
                self._first,
            )


def pair_lines(pairs: Iterable[PreferencePair]) -> Iterator[str]:
    """JSONL as a run folder stores it, line by line."""
    return (p.model_dump_json(exclude_none=True) + "\n" for p in pairs)


def record_line(pair: PreferencePair) -> str:
    """A pair as a line of JSONL, its paths absolute."""
    record = absolute(pair, Path.cwd()).model_dump(mode="json", exclude_none=True)
    return json.dumps(record, ensure_ascii=False) + "\n"


def pairs_text(pairs: Iterable[PreferencePair]) -> str:
    """JSONL as a run folder stores it."""
    return "".join(pair_lines(pairs))


def write_pairs(path: Path, pairs: Iterable[PreferencePair]) -> None:
    """Write JSONL with absolute image paths, UTF-8; the file appears whole or not at all.

    Raises:
        PairsError: the file cannot be written, or a file name has bytes that are not UTF-8.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for pair in pairs:
                file.write(record_line(pair))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except UnicodeEncodeError as error:
        raise PairsError(f"A file name or prompt is not valid Unicode: {error.object!r}. Rename the file.") from error
    except OSError as error:
        raise PairsError(f"Cannot write {path}: {error.strerror}. Check the folder and its free space.") from error
    finally:
        temporary.unlink(missing_ok=True)


def pairs_hash(pairs: Sequence[PreferencePair]) -> str:
    """sha256 over what is trained on: prompts, weights, scores and the bytes of the images, in order.

    Paths, `source` and `held_out` do not count, so that a moved data set keeps its hash.

    Raises:
        PairsError: an image is missing or cannot be read.
    """
    digest = hashlib.sha256()
    hash_of = lru_cache(_HASHES)(_file_hash)
    for number, pair in enumerate(pairs, start=1):
        record: dict[str, Any] = pair.model_dump(mode="json", exclude={*IMAGE_FIELDS, "source", "held_out"})
        for name in IMAGE_FIELDS:
            path = getattr(pair, name)
            if path is None:
                record[name] = None
                continue
            try:
                record[name] = hash_of(path)
            except OSError as error:
                raise _unreadable(error, path, number, name) from error
        digest.update(json.dumps(record, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unreadable(error: OSError, path: Path, number: int, name: str) -> PairsError:
    role = name.replace("_", " ") + ("" if name.endswith("mask") else " image")
    if isinstance(error, FileNotFoundError):
        return PairsError(f"Pair {number}: {role} is missing: {path}. Fix the folder and scan again.")
    return PairsError(f"Pair {number}: {role} cannot be read: {path}: {error.strerror}.")


def json_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, dict[str, Any] | str]]:
    """The lines of an open JSONL file that are not empty: number from 1, offset in bytes, fields or what is wrong.

    Raises:
        PairsError: it is not UTF-8.
    """
    # Only \n ends a line: prompts may hold U+2028 and its like, which are no line ends in JSONL.
    offset = 0
    for number, line in enumerate(file, start=1):
        begin, offset = offset, offset + len(line)
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line.removeprefix(codecs.BOM_UTF8)
            begin += len(codecs.BOM_UTF8)
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise PairsError(
                f"{path} is not UTF-8 (byte {begin + error.start}). Save it as UTF-8 and read it again."
            ) from error
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            yield number, begin, f"not JSON ({error})"
            continue
        yield number, begin, record if isinstance(record, dict) else "not a JSON object with the fields of a pair"


@contextmanager
def open_list(path: Path) -> Iterator[BinaryIO]:
    """A manifest, open for reading.

    Raises:
        PairsError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise PairsError(f"Cannot read {path}: {error.strerror}. Check the path.") from error


def read_text(path: Path) -> str:
    """A manifest's text.

    Raises:
        PairsError: it is missing or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PairsError(f"{path} is not UTF-8 (byte {error.start}). Save it as UTF-8 and read it again.") from error
    except OSError as error:
        raise PairsError(f"Cannot read {path}: {error.strerror}. Check the path.") from error


def absolute(pair: PreferencePair, folder: Path) -> PreferencePair:
    """The pair with absolute paths; relative ones start at `folder`."""
    relative = {n: getattr(pair, n) for n in IMAGE_FIELDS}
    moved = {n: folder / p for n, p in relative.items() if p is not None and not p.is_absolute()}
    return pair.model_copy(update=moved) if moved else pair


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown field {name}; there are {', '.join(PreferencePair.model_fields)}"
    if error["type"] == "missing":
        return f"{name} is missing"
    return f"{name}: {str(error['msg']).removeprefix('Value error, ')} (got {error['input']!r})"
