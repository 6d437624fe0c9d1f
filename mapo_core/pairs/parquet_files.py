"""Where parquet files lie: a file, a folder, or a data set on the Hugging Face Hub, which is read in pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import PairsError

if TYPE_CHECKING:
    from collections.abc import Callable

HUB = "hf://datasets/"


@dataclass(frozen=True)
class ParquetFile:
    """One file to be read.

    Attributes:
        label: what messages call it.
        name: its own name, without folders.
        identity: changes when the file does.
        open: gives what pyarrow reads from: a path, or an open remote file.
        remote: reading it goes over the network.
    """

    label: str
    name: str
    identity: str
    open: Callable[[], Any]
    remote: bool


def is_hub_source(source: object) -> bool:
    """Whether a source is written as a data set on the Hub, `hf://datasets/OWNER/NAME[@REVISION][/PATTERN]`."""
    return isinstance(source, str) and source.startswith("hf://")


def parquet_files(source: Path | str) -> list[ParquetFile]:
    """The parquet files of a source, in the order of their names.

    Args:
        source: a file, a folder, or `hf://datasets/yuvalkirstain/pickapic_v2/data/validation*.parquet`; without a
            pattern all parquet files of the data set.

    Raises:
        PairsError: there are none, or the Hub cannot be reached.
    """
    if isinstance(source, str) and is_hub_source(source):
        return _hub_files(source)
    source = Path(source)
    paths = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not paths:
        raise PairsError(f"There are no .parquet files in {source}. Check the path.")
    return [_local_file(path) for path in paths]


def _local_file(path: Path) -> ParquetFile:
    try:
        state = path.stat()
    except OSError as error:
        raise PairsError(f"Cannot read {path}: {error.strerror or error}. Check the path.") from error
    identity = f"{path.absolute()} {state.st_size} {state.st_mtime_ns}"
    return ParquetFile(str(path), path.name, identity, lambda: path, remote=False)


def _hub_files(source: str) -> list[ParquetFile]:
    place = source.removeprefix(HUB)
    parts = place.strip("/").split("/")
    if not source.startswith(HUB) or len(parts) < 2 or not all(parts):
        raise PairsError(
            f"{source} is not a data set on the Hub. Write hf://datasets/OWNER/NAME, for example "
            "hf://datasets/yuvalkirstain/pickapic_v2/data/validation*.parquet."
        )
    pattern = "/".join(parts) if len(parts) > 2 else f"{'/'.join(parts)}/**/*.parquet"
    system = hub_file_system()
    try:
        found = system.glob(f"datasets/{pattern}", detail=True)
    except Exception as error:  # the Hub's errors are of many kinds: unreachable, unknown, private, gated
        raise PairsError(
            f"Cannot list {source}: {error}. Check its name and the network; a private or gated data set needs a "
            "token (huggingface-cli login, or HF_TOKEN)."
        ) from error
    paths = sorted(path for path in found if path.endswith(".parquet"))
    if not paths:
        raise PairsError(f"There are no .parquet files at {source}. Check the owner, the name and the pattern.")
    return [_hub_file(system, path, found[path]) for path in paths]


def _hub_file(system: Any, path: str, info: dict[str, Any]) -> ParquetFile:
    # The id of the content where the Hub gives one; a file of a Hub repository does not change under the same id.
    version = info.get("blob_id") or info.get("oid") or f"{info.get('size')} {info.get('mtime')}"
    label = f"hf://{path}"
    return ParquetFile(label, path.rpartition("/")[2], f"{label} {version}", lambda: system.open(path, "rb"), True)


def hub_file_system() -> Any:
    """The Hub as a file system of fsspec; only the byte ranges that are asked for are transferred."""
    from huggingface_hub import HfFileSystem

    return HfFileSystem()
