"""Pairs from parquet files as Pick-a-Pic has them: two images, their label and the caption in each row."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..cache_space import SPARE_BYTES, free_bytes, gigabytes
from ..errors import PairsError
from .findings import Finding
from .pair import PairSet, PreferencePair
from .pair_list import spool_pairs
from .parquet_files import ParquetFile, parquet_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

_REQUIRED = ("jpg_0", "jpg_1", "label_0", "caption")
_IMAGES = ("jpg_0", "jpg_1")
_OPTIONAL = ("label_1", "has_label")
_ROWS = 32  # rows turned into Python objects at a time
_BUFFER_BYTES = 2**20
_LEFT_OUT = {
    "tie": "are ties",
    "near tie": "have labels too near a tie",
    "small": "have an image smaller than asked for",
    "unlabelled": "have no label, or labels that do not agree",
    "no image": "lack an image, or hold something else in its place",
}


@dataclass(frozen=True)
class RowFilter:
    """Which rows of a parquet file become pairs.

    Attributes:
        min_margin: how clear the label must be, abs(label_0 - label_1), 0-1; 1 keeps unanimous ones only.
        min_side: shorter side that both images must have, pixels.
        limit: stop after so many pairs; the rest of the files is not read.
    """

    min_margin: float = 0.0
    min_side: int = 0
    limit: int | None = None


def pairs_from_parquet(
    source: Path | str,
    out_dir: Path,
    *,
    keep: RowFilter | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PairSet:
    """Read Pick-a-Pic-style parquet: columns jpg_0, jpg_1, label_0, caption, and label_1 and has_label if there.

    label_0 is 1 where jpg_0 is preferred, 0 where jpg_1 is, 0.5 for a tie. Each different image is written once, to
    `out_dir/images` under its sha256. A row group that is done leaves a file in `out_dir/parts`, so that a run that was
    interrupted goes on there; memory is that of the largest row group's pages, whatever the size of the file.

    Args:
        source: a file, a folder with `.parquet` files, or a data set on the Hub, as `parquet_files` takes them. Of the
            Hub's files only the row groups that are needed are transferred, none beyond `keep.limit`.
        out_dir: where images and parts go.
        keep: which rows are wanted; None for all with a clear label. Images of other rows are not unpacked.
        progress: called with (rows done, rows in all) after each row group.

    Returns:
        The pairs in order; `counts` has them ("parquet caption") and the rows left out, by reason.

    Raises:
        PairsError: pyarrow is missing, a file cannot be read or lacks a column, the disk has too little room for the
            images, or no pair results.
    """
    keep = keep or RowFilter()
    parquet = _pyarrow_parquet()
    files = parquet_files(source)
    room = _Room(keep)
    seen = files[:1] if files[0].remote else files  # asking each of many remote files takes a request or two
    for file in seen:  # a fault in the last is told before the first is unpacked
        with _open(parquet, file) as table:
            room.add(file, table)
    total = room.rows * len(files) // len(seen)  # of remote files an estimate
    room.check(source, out_dir, len(files) / len(seen), sum(len(_parts(file, out_dir, keep)) for file in files))
    counts: Counter[str] = Counter()
    done = 0

    def rows_of(file: ParquetFile) -> Iterator[PreferencePair]:
        nonlocal done
        with _open(parquet, file) as table:
            for group in range(table.num_row_groups):
                part = _part(file, table, group, out_dir, keep)
                counts.update(part["left_out"])
                done += table.metadata.row_group(group).num_rows
                if progress:
                    progress(done, max(done, total))
                yield from (_pair(record, out_dir) for record in part["pairs"])

    # Lazily: beyond the limit no file is opened and no row group read.
    wanted = islice((pair for file in files for pair in rows_of(file)), keep.limit)
    pairs = spool_pairs(wanted, out_dir / "pairs.jsonl")
    findings = [_left_out(reason, counts[reason], done) for reason in _LEFT_OUT if counts[reason]]
    if not pairs:
        problems = [finding.message for finding in findings]
        raise PairsError(f"No pair results from {source}: " + (" ".join(problems) or "there are no rows."), problems)
    return PairSet(pairs, findings, {"parquet caption": len(pairs), **counts})


def _pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise PairsError("Reading parquet needs pyarrow, which is not installed: pip install pyarrow") from None
    return pyarrow.parquet


def _open(parquet: Any, file: ParquetFile) -> Any:
    try:
        table = parquet.ParquetFile(file.open(), pre_buffer=False, buffer_size=_BUFFER_BYTES)
    except OSError as error:
        check = "Check the network." if file.remote else "Check the path."
        raise PairsError(f"Cannot read {file.label}: {error.strerror or error}. {check}") from error
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise PairsError(
            f"{file.label} is not a parquet file, or was cut short: {error}. Download it again."
        ) from error
    lacking = [name for name in _REQUIRED if name not in table.schema_arrow.names]
    if lacking:
        there = ", ".join(table.schema_arrow.names)
        raise PairsError(
            f"{file.label} lacks the columns {', '.join(lacking)}; it has {there}. Rename them, or use JSONL."
        )
    return table


def _part(file: ParquetFile, table: Any, group: int, out_dir: Path, keep: RowFilter) -> dict[str, Any]:
    """The pairs of one row group, from an earlier run where that finished it."""
    path = out_dir / "parts" / f"{_part_name(file, keep)}-{group:05}.json"
    if path.is_file():
        part = json.loads(path.read_bytes())
        if all((out_dir / record[role]).is_file() for record in part["pairs"] for role in ("chosen", "rejected")):
            return part
    try:
        part = _convert(file, table, group, out_dir, keep)
        _write_new(path, json.dumps(part, ensure_ascii=False).encode())
    except (OSError, ValueError) as error:  # the second from pyarrow, on damaged pages
        raise PairsError(
            f"Cannot go on with {file.label}: {error}. Check the file and the space in {out_dir}."
        ) from error
    return part


def _part_name(file: ParquetFile, keep: RowFilter) -> str:
    text = f"{file.identity} {keep.min_margin} {keep.min_side}"
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _parts(file: ParquetFile, out_dir: Path, keep: RowFilter) -> list[Path]:
    """What earlier runs have finished of a file."""
    return list((out_dir / "parts").glob(f"{_part_name(file, keep)}-*.json"))


class _Room:
    """What the images of some files will take on the disk, by what the files say of themselves.

    Attributes:
        rows: of the files.
    """

    def __init__(self, keep: RowFilter) -> None:
        self._keep = keep
        self.rows = self._groups = self._kept = 0
        self._bytes = 0.0

    def add(self, file: ParquetFile, table: Any) -> None:
        """Count a file: the images of the rows whose label is wanted; of a remote file no label is read for that."""
        labels = [name for name in ("label_0", *_OPTIONAL) if name in table.schema_arrow.names]
        for group in range(table.num_row_groups):
            about = table.metadata.row_group(group)
            columns = [about.column(i) for i in range(about.num_columns)]
            size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] in _IMAGES)
            kept = about.num_rows
            if not file.remote:
                try:
                    rows = table.read_row_group(group, columns=labels).to_pylist()
                except (OSError, ValueError):  # said with its words when the group is unpacked
                    rows = []
                kept = sum(_label_fault(row, self._keep) is None for row in rows)
            self._groups += 1
            self.rows += about.num_rows
            self._kept += kept
            self._bytes += size * kept / max(1, about.num_rows)

    def check(self, source: object, out_dir: Path, files: float, done_groups: int) -> None:
        """Stop before anything is unpacked that will not fit.

        Args:
            source, out_dir: as of `pairs_from_parquet`.
            files: how many there are for each that was counted.
            done_groups: row groups that earlier runs have finished.

        Raises:
            PairsError: there is too little room.
        """
        left = max(0.0, 1 - done_groups / max(1.0, self._groups * files))
        wanted = 1.0 if self._keep.limit is None else min(1.0, self._keep.limit / max(1.0, self._kept * files))
        needed = int(self._bytes * files * left * wanted)
        free = free_bytes(out_dir)
        if needed + SPARE_BYTES > free:
            raise PairsError(
                f"The images in {source} will take about {gigabytes(needed)} in {out_dir}, and only {gigabytes(free)} "
                f"are free there ({gigabytes(SPARE_BYTES)} are kept for the runs). Take fewer pairs (--limit), make "
                "room, or set MAPO_HOME to a folder on another disk. What is unpacked already is kept."
            )


def _convert(file: ParquetFile, table: Any, group: int, out_dir: Path, keep: RowFilter) -> dict[str, Any]:
    first = sum(table.metadata.row_group(g).num_rows for g in range(group))
    columns = [*_REQUIRED, *(name for name in _OPTIONAL if name in table.schema_arrow.names)]
    batches = table.iter_batches(batch_size=_ROWS, row_groups=[group], columns=columns)
    rows: Iterable[dict[str, Any]] = (row for batch in batches for row in batch.to_pylist())
    records: list[dict[str, str]] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(rows, start=first + 1):
        record = _record(row, out_dir, keep)
        if isinstance(record, str):
            left_out[record] += 1
        else:
            records.append({**record, "source": f"{file.name} row {number}; prompt from caption"})
    return {"pairs": records, "left_out": left_out}


def _record(row: dict[str, Any], out_dir: Path, keep: RowFilter) -> dict[str, str] | str:
    """A pair with image paths below `out_dir`, or the reason why the row gives none."""
    if fault := _label_fault(row, keep):
        return fault
    label = row["label_0"]
    images = [_image_bytes(row[name]) for name in (("jpg_0", "jpg_1") if label > 0.5 else ("jpg_1", "jpg_0"))]
    suffixes = [_suffix(content) for content in images]
    if not all(suffixes):
        return "no image"
    if keep.min_side and min(_side(content) for content in images) < keep.min_side:
        return "small"
    chosen, rejected = (_store(c, s, out_dir) for c, s in zip(images, suffixes, strict=True))
    return {"prompt": " ".join((row["caption"] or "").split()), "chosen": chosen, "rejected": rejected}


def _label_fault(row: dict[str, Any], keep: RowFilter) -> str | None:
    """Why a row's label is not wanted; None if it is."""
    label, other = row["label_0"], row.get("label_1")
    if label is None or row.get("has_label") is False or not 0 <= label <= 1:
        return "unlabelled"
    if other is not None and abs(label + other - 1) > 1e-6:
        return "unlabelled"
    if abs(label - 0.5) < 1e-6:
        return "tie"
    return "near tie" if abs(2 * label - 1) < keep.min_margin - 1e-6 else None


def _image_bytes(value: Any) -> bytes:
    """Bytes, plain or as the `datasets` library wraps them; empty where there are none."""
    content = value.get("bytes") if isinstance(value, dict) else value
    return content if isinstance(content, bytes) else b""


def _suffix(content: bytes) -> str:
    if content[8:12] == b"WEBP":
        return ".webp"
    starts = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"BM": ".bmp"}
    return next((suffix for start, suffix in starts.items() if content.startswith(start)), "")


def _side(content: bytes) -> int:
    """Shorter side, pixels, from the header; 0 where it has none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return min(image.size)
    except (OSError, ValueError):
        return 0


def _store(content: bytes, suffix: str, out_dir: Path) -> str:
    """Write an image under its hash, once; its path below `out_dir`."""
    name = hashlib.sha256(content).hexdigest()
    relative = f"images/{name[:2]}/{name}{suffix}"
    path = out_dir / relative
    if not path.is_file():
        _write_new(path, content)
    return relative


def _write_new(path: Path, content: bytes) -> None:
    """A file is there whole or not at all, so that what is there need not be written again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk is not to be filled with halves
        raise


def _pair(record: dict[str, str], out_dir: Path) -> PreferencePair:
    chosen, rejected = (out_dir.absolute() / record[role] for role in ("chosen", "rejected"))
    return PreferencePair(prompt=record["prompt"], chosen=chosen, rejected=rejected, source=record["source"])


def _left_out(reason: str, count: int, total: int) -> Finding:
    level = "note" if reason in {"tie", "near tie", "small"} else "warning"
    return Finding(level, "rows-left-out", f"{count} of {total} rows {_LEFT_OUT[reason]} and were left out.")
