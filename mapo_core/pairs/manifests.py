"""Pairs from lists: JSONL and CSV."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PairsError
from .pair import PairSet, PreferencePair, checked_pairs, open_list, read_text
from .pair_list import KEPT, open_pairs, spool_pairs
from .parquet import RowFilter, pairs_from_parquet
from .parquet_files import is_hub_source

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

logger = logging.getLogger(__name__)


def read_pair_set(path: Path | str, images_dir: Path | None = None, keep: RowFilter | None = None) -> PairSet:
    """Read pairs from any file or folder that holds them: JSONL, CSV, or parquet (a file or a folder of files).

    Args:
        path: what to read; a data set on the Hub is written `hf://datasets/OWNER/NAME[/PATTERN]`.
        images_dir: where the images inside parquet files are unpacked; None: a folder of their own under `MAPO_HOME`,
            found again the next time.
        keep: which rows of parquet files are wanted; of other files all are.

    Raises:
        PairsError: as of `pairs_from_manifest` and `pairs_from_parquet`; or a filter for what is not parquet.
    """
    if isinstance(path, str) and is_hub_source(path):
        return pairs_from_parquet(path, images_dir or _unpacked(path), keep=keep)
    path = Path(path)
    if path.is_dir() or path.suffix.lower() == ".parquet":
        return pairs_from_parquet(path, images_dir or _unpacked(path), keep=keep)
    if keep not in (None, RowFilter()):
        raise PairsError(f"Rows can be filtered in parquet files only, and {path} is none. Leave the filter out.")
    return pairs_from_manifest(path)


def read_pair_source(path: Path | str, keep: RowFilter | None = None) -> Sequence[PreferencePair]:
    """The pairs of `read_pair_set`; what a person should know is logged as warnings."""
    found = read_pair_set(path, keep=keep)
    for finding in found.findings:
        logger.warning("%s", finding.message)
    return found.pairs


def pairs_from_manifest(path: Path) -> PairSet:
    """Read a JSONL or CSV manifest, by its suffix (`.jsonl`, `.ndjson`; `.csv`, `.tsv`).

    Raises:
        PairsError: another suffix, or as of `pairs_from_jsonl` and `pairs_from_csv`.
    """
    suffix = path.suffix.lower()
    if suffix in {".jsonl", ".ndjson"}:
        return pairs_from_jsonl(path)
    if suffix in {".csv", ".tsv"}:
        return pairs_from_csv(path)
    raise PairsError(f"{path} is not a list of pairs: its name must end in .jsonl, .ndjson, .csv, .tsv or .parquet.")


def pairs_from_jsonl(path: Path) -> PairSet:
    """Read one pair per line, with the fields of `PreferencePair`; image paths are relative to the file's folder.

    Raises:
        PairsError: the file cannot be read, or lines are wrong; `problems` has them.
    """
    found = open_pairs(path, _source(path))
    return _found(path, found if len(found) > KEPT else list(found))


def pairs_from_csv(path: Path) -> PairSet:
    """Read one pair per row; the first row names the columns, which are the fields of `PreferencePair`.

    Cells are separated by commas, semicolons or tabs, whichever the first row has most of; an empty cell is a field not
    given, but for the prompt, which may be empty. Image paths are relative to the file's folder.

    Raises:
        PairsError: the file cannot be read, or rows are wrong; `problems` has them.
    """
    pairs = checked_pairs(path, _csv_records(path), _source(path))
    return _found(path, spool_pairs(pairs, _unpacked(path) / "pairs.jsonl"))


def _csv_records(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with open_list(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        try:
            header = text.readline()
            text.seek(0)
            yield from _csv_rows(csv.DictReader(text, delimiter=max(",;\t", key=header.count), strict=True))
        except UnicodeDecodeError:
            read_text(path)  # says where
            raise


def _csv_rows(reader: csv.DictReader) -> Iterator[tuple[int, dict[str, Any] | str]]:
    try:
        for row in reader:
            if None in row:
                yield (
                    reader.line_num,
                    f"more cells than the {len(row) - 1} columns; quote cells that hold the separator",
                )
            else:
                yield (
                    reader.line_num,
                    {k.strip(): v for k, v in row.items() if v or (v == "" and k.strip() == "prompt")},
                )
    except csv.Error as error:
        yield reader.reader.line_num, f"not CSV ({error})"


def _unpacked(source: Path | str) -> Path:
    from ..runs import mapo_home

    if isinstance(source, Path):
        name, text = source.stem, str(source.resolve())
    else:  # hf://datasets/OWNER/NAME/...
        name, text = "".join(source.split("/")[4:5]).partition("@")[0] or "hub", source
    return mapo_home() / "unpacked" / f"{name}-{hashlib.sha256(text.encode(errors='replace')).hexdigest()[:8]}"


def _source(path: Path) -> str:
    """Where pairs come from that do not say it."""
    return f"{path.name}; prompt from {path.name}"


def _found(path: Path, pairs: Sequence[PreferencePair]) -> PairSet:
    if not pairs:
        raise PairsError(f"{path} has no pairs. Each line needs at least prompt, chosen and rejected.")
    return PairSet(pairs, [], {"manifest": len(pairs)})
