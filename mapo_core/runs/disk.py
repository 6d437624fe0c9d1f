"""Files and folders that appear complete or not at all, and a hook that kills the process between any two writes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from .process import process_start_time

_NEW = ".tmp-"  # being written, or being removed
_OLD = ".old-"  # set aside while its replacement moves in
_FAULT = os.environ.get("MAPO_FAULT")
_ATTEMPTS = 40 if os.name == "nt" else 1  # on Windows a virus scanner holds a fresh file for a moment
_ATTEMPT_PAUSE_S = 0.05

_fault_lock = threading.Lock()
_faults_reached = 0
_own_names: set[str] = set()


def fault_point(name: str) -> None:
    """Mark a moment between two writes, so that tests can end the process exactly there.

    With `MAPO_FAULT=<n>` in the environment at import, the n-th point reached (from 1) kills the process; with
    `MAPO_FAULT=list:<file>` each point's name is appended to that file. Otherwise it does nothing.
    """
    if _FAULT is not None:
        _reach(name, _FAULT)


def faults_armed() -> bool:
    """Whether `MAPO_FAULT` is set, so that a writer may write in halves to offer a point in between."""
    return _FAULT is not None


def _reach(name: str, fault: str) -> None:
    global _faults_reached
    with _fault_lock:
        _faults_reached += 1
        if fault.startswith("list:"):
            with Path(fault.removeprefix("list:")).open("a", encoding="utf-8") as file:
                file.write(name + "\n")
        elif _faults_reached == int(fault):
            if os.name != "nt":
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(137)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file under a temporary name in its folder and move it into place; text is stored as UTF-8.

    Readers see the old file or the whole new one, also after a kill or a power cut. A killed writer leaves a `.tmp-`
    file, which `remove_leftovers` removes.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    path.parent.mkdir(parents=True, exist_ok=True)
    fault_point(f"{path.name}:start")
    with _temp_beside(path) as temp:
        with temp.open("wb") as file:
            fault_point(f"{path.name}:opened")
            if faults_armed():
                file.write(content[: len(content) // 2])
                file.flush()
                fault_point(f"{path.name}:half")
                file.seek(0)
            file.write(content)
            file.flush()
            fault_point(f"{path.name}:written")
            os.fsync(file.fileno())
        fault_point(f"{path.name}:synced")
        patiently(lambda: temp.replace(path))
    fault_point(f"{path.name}:replaced")
    sync_folder(path.parent)


@contextlib.contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it becomes `path` when the block ends, and is removed when it raises.

    A folder that is already at `path` is replaced. A kill between the two renames of a replacement leaves the old
    folder set aside, and `remove_leftovers` puts it back.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fault_point(f"{path.name}:start")
    with _temp_beside(path) as temp:
        temp.mkdir()
        fault_point(f"{path.name}:opened")
        yield temp
        fault_point(f"{path.name}:filled")
        _sync_tree(temp)
        fault_point(f"{path.name}:synced")
        if path.exists():
            _replace_folder(temp, path)
        else:
            patiently(lambda: temp.rename(path))
    fault_point(f"{path.name}:replaced")
    sync_folder(path.parent)


def _replace_folder(temp: Path, path: Path) -> None:
    old = _free_name(path, _OLD)
    _own_names.add(old.name)
    try:
        patiently(lambda: path.rename(old))
        fault_point(f"{path.name}:set aside")
        try:
            patiently(lambda: temp.rename(path))
        except OSError:
            patiently(lambda: old.rename(path))
            raise
        fault_point(f"{path.name}:moved in")
        _remove(old, path.name)
    finally:
        _own_names.discard(old.name)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill on the way never leaves half of it under its own name."""
    _remove(path, path.name)


def _remove(path: Path, label: str) -> None:
    with _temp_beside(path) as temp:
        fault_point(f"{label}:removing")
        patiently(lambda: path.rename(temp))
        fault_point(f"{label}:renamed")
    fault_point(f"{label}:removed")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished in a folder (not below it); put back a folder they set aside.

    What a living process is writing stays.
    """
    for path in list(folder.iterdir()):
        prefix = next((p for p in (_NEW, _OLD) if path.name.startswith(p)), None)
        if prefix is None or not _is_stale(path, prefix):
            continue
        target = folder / path.name.removeprefix(prefix).split("-", 2)[2]
        if prefix == _OLD and not target.exists():
            patiently(lambda source=path, target=target: source.rename(target))
        else:
            _discard(path)
        fault_point(f"{target.name}:cleaned")


def is_leftover(path: Path) -> bool:
    """Whether a name is one of ours for something unfinished."""
    return path.name.startswith((_NEW, _OLD))


@contextlib.contextmanager
def temp_folder(parent: Path, name: str) -> Iterator[Path]:
    """A new folder beside the place it is meant for; removed at the end unless it has been moved away."""
    with _temp_beside(parent / name) as temp:
        temp.mkdir()
        yield temp


def _free_name(path: Path, prefix: str) -> Path:
    return path.with_name(f"{prefix}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}")


@contextlib.contextmanager
def _temp_beside(path: Path) -> Iterator[Path]:
    """A free name that is known as ours while the block runs; what is still there at its end is removed."""
    temp = _free_name(path, _NEW)
    _own_names.add(temp.name)
    try:
        yield temp
    finally:
        _discard(temp)
        _own_names.discard(temp.name)


def _is_stale(path: Path, prefix: str) -> bool:
    pid = path.name.removeprefix(prefix).split("-", 2)[0]
    if not pid.isdigit() or path.name in _own_names:
        return False
    # A container gives every start the same few ids: our own id on a name that is not ours is an earlier process.
    return int(pid) == os.getpid() or process_start_time(int(pid)) is None


def _discard(path: Path) -> None:
    # Another process may be removing the same leftover.
    with contextlib.suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            patiently(lambda: shutil.rmtree(path))
        else:
            patiently(path.unlink)


def patiently(action: Callable[[], object]) -> None:
    """Do it; on Windows again for up to two seconds while another program holds the file.

    Raises:
        PermissionError: it is still held.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            action()
        except PermissionError:
            time.sleep(_ATTEMPT_PAUSE_S)
        else:
            return
    action()


def _sync_tree(folder: Path) -> None:
    """Force a folder's files and names to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Force a folder's names to the disk, where the system can."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems cannot sync a folder; the rename is in effect all the same.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
