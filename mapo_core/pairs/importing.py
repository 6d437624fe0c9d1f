"""Pairs from what people drop on a page: archives, uploaded folders, lists; kept in a folder of their own."""

from __future__ import annotations

import hashlib
import shutil
import stat
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ..errors import PairsError
from ..runs import mapo_home
from .folders import pairs_from_folders
from .images import IMAGE_SUFFIXES, list_files, list_images
from .manifests import read_pair_set
from .pair import IMAGE_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from .pair import PairSet, PreferencePair

CHOSEN_NAMES = ("chosen", "good", "win", "winner", "preferred", "positive")
REJECTED_NAMES = ("rejected", "bad", "lose", "loser", "dispreferred", "negative")
LISTS = frozenset({".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"})
_UNPACKED = IMAGE_SUFFIXES | LISTS | {".txt"}
_SYSTEM = ("__MACOSX",)
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class ZipLimits:
    """What an archive may hold at most.

    Attributes:
        files: number of files.
        total_bytes: all of them together, unpacked.
        file_bytes: one of them.
        ratio: unpacked size over packed size of one file, from 16 MiB on; more is an attack, not a picture.
    """

    files: int = 200_000
    total_bytes: int = 64 * 2**30
    file_bytes: int = 8 * 2**30
    ratio: int = 200


def unpack_zip(
    archive: Path,
    folder: Path,
    limits: ZipLimits | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Unpack images, caption files and lists of an archive; other files, links and `__MACOSX` are passed over.

    Args:
        archive: the .zip file.
        folder: where to; it appears complete or not at all, and one that is there is not touched.
        limits: of the archive.
        progress: called with files done and in all.

    Returns:
        `folder`.

    Raises:
        PairsError: it is not a zip file, is damaged or has a password, has a path that leads out of it, or is larger
            than the limits allow. Nothing is then left.
    """
    limits = limits or ZipLimits()
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as opened:
            wanted = _wanted(archive, opened, limits)
            _make_room(archive, sum(i.file_size for i, _ in wanted), folder.parent)
            for done, (info, relative) in enumerate(wanted):
                progress(done, len(wanted))
                _unpack(opened, info, draft.joinpath(*relative.parts))
            progress(len(wanted), len(wanted))
        draft.rename(folder)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise PairsError(f"{archive.name} is not a zip file, or is damaged: {error}. Pack it again.") from error
    except RuntimeError as error:  # zipfile's word for a password
        raise PairsError(f"{archive.name} cannot be unpacked: {error}. Pack it without a password.") from error
    except OSError as error:
        raise PairsError(f"Cannot unpack {archive.name} into {folder.parent}: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def keep_zip(archive: Path, name: str = "", progress: Callable[[int, int], None] = lambda done, total: None) -> Path:
    """Unpack an archive under `MAPO_HOME`, into a folder that is found again for the same content."""
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    return unpack_zip(
        archive, mapo_home() / "uploads" / f"{_plain(Path(name or archive.name).stem)}-{digest}", None, progress
    )


def keep_files(files: Sequence[tuple[str, Path]], name: str = "folder") -> Path:
    """Copy the files of an uploaded folder under `MAPO_HOME`, where no browser's session ends their life.

    Args:
        files: (path inside the folder as the browser gave it, where the file lies now).
        name: of the folder, for people.

    Returns:
        The folder; the same files are kept once.

    Raises:
        PairsError: there is no image among them, a path leads out of the folder, or the disk refuses.
    """
    wanted = [(_inside(relative, name), path) for relative, path in files]
    wanted = sorted((r, p) for r, p in wanted if r.suffix.lower() in _UNPACKED and not _is_system(r))
    names = Counter(r.as_posix().casefold() for r, _ in wanted)
    if twice := [n for n, count in names.items() if count > 1]:
        raise PairsError(
            f"{name} has several files named {twice[0]} in its subfolders; a browser does not say which lies where. "
            "Drop a zip of the folder, or name its path on this machine."
        )
    if not any(r.suffix.lower() in IMAGE_SUFFIXES for r, _ in wanted):
        raise PairsError(f"There is no image in {name}. It needs files such as {', '.join(sorted(IMAGE_SUFFIXES))}.")
    digest = hashlib.sha256()
    try:
        for relative, path in wanted:
            with path.open("rb") as file:
                digest.update(f"{relative}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        folder = mapo_home() / "uploads" / f"{_plain(name)}-{digest.hexdigest()[:16]}"
        if folder.exists():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for relative, path in wanted:
                target = draft.joinpath(*relative.parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
            draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise PairsError(f"Cannot keep the files of {name}: {error.strerror or error}. Check the disk.") from error
    return folder


def pairs_from_dropped(folder: Path, **words: Any) -> PairSet:
    """The pairs of an unpacked folder: from the list in it, or from its two folders of images.

    Args:
        folder: with one list (`pairs.jsonl`, another .jsonl, .csv or parquet), or with folders `chosen` and `rejected`.
        words: of `pairs_from_folders`, for example `prompt` and `trigger`; a list has its own prompts.

    Raises:
        PairsError: neither is there, or as of the readers. What a list names must lie inside the folder.
    """
    lists = [p for p in list_files(folder) if p.suffix.lower() in LISTS]
    named = [p for p in lists if p.name == "pairs.jsonl"] or lists
    if named and (len(named) == 1 or all(p.suffix.lower() == ".parquet" for p in named)):
        source = named[0] if len(named) == 1 else folder
        found = read_pair_set(source)
        if source.suffix.lower() in LISTS - {".parquet"}:
            require_inside(found.pairs, [folder])
        return found
    if named:
        raise PairsError(f"There are {len(named)} lists: {', '.join(p.name for p in named[:5])}. Leave one of them.")
    chosen, rejected = two_folders(folder)
    return pairs_from_folders(chosen, rejected, **words)


def two_folders(folder: Path) -> tuple[Path, Path]:
    """The chosen and the rejected folder inside a folder, by their names.

    Raises:
        PairsError: they are not there, or not clearly; the message says what is.
    """
    holders = dict.fromkeys(
        parent for p in list_images(folder) for parent in p.parents if parent.is_relative_to(folder)
    )
    found = [
        [p for p in holders if p != folder and p.name.lower() in names] for names in (CHOSEN_NAMES, REJECTED_NAMES)
    ]
    if len(found[0]) == 1 and len(found[1]) == 1:
        return found[0][0], found[1][0]
    there = ", ".join(sorted(p.relative_to(folder).as_posix() for p in holders if p != folder)[:6]) or "no folder"
    raise PairsError(
        f"It is not clear which images are preferred. Name the two folders chosen and rejected; there is {there}."
    )


def require_inside(pairs: Iterable[PreferencePair], roots: Sequence[Path]) -> None:
    """Refuse pairs whose images lie outside some folders, through links too.

    Raises:
        PairsError: names the first one.
    """
    allowed = [root.resolve() for root in roots]
    for number, pair in enumerate(pairs, start=1):
        for name in IMAGE_FIELDS:
            path = getattr(pair, name)
            if path is not None and not any(path.resolve().is_relative_to(root) for root in allowed):
                raise PairsError(
                    f"Pair {number}: {path} lies outside {' and '.join(map(str, roots))}. Put the image beside the "
                    "list, and name it by its path from there."
                )


def _wanted(archive: Path, opened: zipfile.ZipFile, limits: ZipLimits) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """The files to unpack, checked by what the archive says of itself."""
    wanted: dict[str, tuple[zipfile.ZipInfo, PurePosixPath]] = {}
    for info in opened.infolist():
        if info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
            continue
        relative = _inside(info.filename, archive.name)
        if relative.suffix.lower() not in _UNPACKED or _is_system(relative):
            continue
        wanted[relative.as_posix().casefold()] = (info, relative)
    files = list(wanted.values())
    if not files:
        raise PairsError(f"There is neither an image nor a list of pairs in {archive.name}.")
    total = sum(info.file_size for info, _ in files)
    if len(files) > limits.files or total > limits.total_bytes:
        raise PairsError(
            f"{archive.name} has {len(files)} files of {total / 2**30:.1f} GiB, more than is unpacked here "
            f"({limits.files} files, {limits.total_bytes / 2**30:.0f} GiB). Unpack it yourself and name its folder."
        )
    for info, relative in files:
        packed = max(1, info.compress_size)
        if info.file_size > limits.file_bytes or (info.file_size > 2**24 and info.file_size / packed > limits.ratio):
            raise PairsError(f"{archive.name}: {relative} is suspiciously large once unpacked. It is not unpacked.")
    return files


def _unpack(opened: zipfile.ZipFile, info: zipfile.ZipInfo, target: Path) -> None:
    """One file; zipfile reads no more of it than the size that was checked, whatever the archive really holds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with opened.open(info) as source, target.open("wb") as out:
        shutil.copyfileobj(source, out, _CHUNK_BYTES)


def _make_room(archive: Path, needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PairsError(
            f"{archive.name} needs {needed / 2**30:.1f} GiB unpacked, and {folder} has {free / 2**30:.1f} GiB free. "
            "Make room, or set MAPO_HOME to another disk."
        )


def _inside(name: str, where: str) -> PurePosixPath:
    """A path inside a folder.

    Raises:
        PairsError: it leads out of it.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    parts = [part for part in path.parts if part not in ("", ".")]
    bad = path.is_absolute() or ".." in parts or not parts or "\0" in name or ":" in parts[0]
    if bad:
        raise PairsError(f"{where} has a path that leads out of it: {name!r}. Nothing of it was taken.")
    return PurePosixPath(*parts)


def _is_system(path: PurePosixPath) -> bool:
    return any(part in _SYSTEM or part.startswith(".") for part in path.parts)


def _plain(name: str) -> str:
    """A name that is a folder's everywhere."""
    text = "".join(c if c.isalnum() or c in "-_" else "-" for c in name).strip("-")[:40]
    return text or "upload"
