"""Where the weights of scorers lie on this machine, and what to download where when they are missing.

Looked for, in this order: a folder that the user names, `models/<name>` under `MAPO_HOME`, the local Hub cache.
Nothing is downloaded unless `download` asks for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MissingWeightsError, ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class WeightSource:
    """A model that a scorer needs.

    Attributes:
        name: of its folder under `MAPO_HOME/models`.
        repo: Hub id.
        files: patterns of the files that must be there; "a|b" is either.
        size: of the download, for people.
        extra: patterns that are downloaded beside them where the repository has them.
        url: of the one file, for what is not on the Hub.
        sha256: of that file.
        name_folder: how else the user can say where it is; empty: as of scorers.
    """

    name: str
    repo: str
    files: tuple[str, ...]
    size: str
    extra: tuple[str, ...] = ()
    url: str | None = None
    sha256: str | None = None
    name_folder: str = ""

    @property
    def patterns(self) -> list[str]:
        """What a download fetches."""
        return [*(part for pattern in self.files for part in pattern.split("|")), *self.extra]


def find_weights(source: WeightSource, folder: Path | None = None, download: bool = False) -> Path:
    """The folder that holds a model.

    Args:
        source: what is needed.
        folder: where the user says it is; nothing else is then looked at.
        download: fetch it from the Hub into the Hub's cache where it is missing.

    Raises:
        MissingWeightsError: it is nowhere, or files are missing; names what to download and where to put it.
        ModelError: the download failed.
    """
    if folder is not None:
        if lacking := _lacking(folder, source):
            raise MissingWeightsError(f"{folder} lacks {', '.join(lacking)} of {source.repo}. {_how(source)}")
        return folder
    kept = home_folder(source)
    cached = None if source.url else _from_hub_cache(source)
    for place in (kept, cached):
        if place is not None and not _lacking(place, source):
            return place
    if download and source.url is not None:
        return _download_url(source, kept)
    if download:
        from ..families._locate import download as fetch

        path = fetch(source.repo, None, source.patterns)
        if lacking := _lacking(path, source):
            raise ModelError(f"{source.repo} was downloaded to {path}, but has no {', '.join(lacking)}.")
        return path
    raise MissingWeightsError(f"The weights of {source.repo} ({source.size}) are not on this machine. {_how(source)}")


def home_folder(source: WeightSource) -> Path:
    """Where a user puts the weights by hand."""
    from ..runs import mapo_home

    return mapo_home() / "models" / source.name


def _how(source: WeightSource) -> str:
    other = source.name_folder or f"name its folder: --weights {source.name}=FOLDER"
    if source.url is not None:
        target = home_folder(source) / _file_name(source)
        return (
            f'Download it once: curl -L --create-dirs -o "{target}" {source.url} (or add '
            f"--download to this command, or {other})."
        )
    files = " ".join(f'--include "{p}"' for p in source.patterns)
    command = f'hf download {source.repo} {files} --local-dir "{home_folder(source)}"'
    return f"Download it once: {command} (or add --download to this command, or {other})."


def _file_name(source: WeightSource) -> str:
    from urllib.parse import unquote

    assert source.url is not None
    return unquote(source.url.rpartition("/")[2])


def _download_url(source: WeightSource, folder: Path) -> Path:
    """Fetch the one file of a source; it is kept only if it is the one that is known."""
    from urllib.request import urlopen

    from ..runs import write_atomic

    assert source.url is not None
    try:
        with urlopen(source.url, timeout=60) as answer:
            content = answer.read()
    except OSError as error:
        raise ModelError(f"Cannot download {source.url}: {error}. {_how(source)}") from error
    if source.sha256 is not None and hashlib.sha256(content).hexdigest() != source.sha256:
        raise ModelError(f"{source.url} gave another file than the one that is known here; it was not kept.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / _file_name(source), content)
    return folder


def _lacking(folder: Path, source: WeightSource) -> list[str]:
    if not folder.is_dir():
        return list(source.files)
    return [pattern for pattern in source.files if not any(_matches(folder, part) for part in pattern.split("|"))]


def _matches(folder: Path, pattern: str) -> bool:
    return any(path.exists() for path in folder.glob(pattern))  # a broken link of the Hub cache does not exist


def _from_hub_cache(source: WeightSource) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.repo, local_files_only=True, allow_patterns=source.patterns))
    except LocalEntryNotFoundError:
        return None


def load_tensors(path: Path, sha256: str | None) -> dict[str, Tensor]:
    """Tensors of a safetensors file; of a pickle only where its sha256 is known, and only tensors.

    Args:
        path: `.safetensors`, `.pt`, `.pth` or `.bin`.
        sha256: that a pickle must have.

    Raises:
        ModelError: a pickle of another or no known hash, or a file that does not hold tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:  # safetensors raises its own and OSError
            raise ModelError(f"{path} is not a safetensors file: {error}. Download it again.") from error
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is None:
        raise ModelError(
            f"{path.name} is a pickle, which can run code when it is read, and no hash of it is known here. Take a "
            f"safetensors form of it, or, if you trust this file, name its hash: --sha256 {actual}"
        )
    if actual != sha256.lower():
        raise ModelError(
            f"{path} is a pickle, which can run code when it is read, and its sha256 is {actual} instead of {sha256}: "
            "it is not read. Download it again."
        )
    from pickle import UnpicklingError

    from torch import Tensor, load

    try:
        found: Any = load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelError(f"{path} holds more than tensors, or is damaged, and is not read. ({error})") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModelError(f"{path} does not hold tensors by name. Download it again.")
    return found


def load_pretrained(kind: Any, path: Path, device: torch.device) -> Any:
    """A transformers model from a folder, complete, frozen and in evaluation mode; safetensors only.

    Args:
        kind: the model's class.
        path: the folder.
        device: where to put it.

    Raises:
        ModelError: the folder does not hold this model, or not all of it.
    """
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = kind.from_pretrained(path, local_files_only=True, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{path} cannot be read as {kind.__name__}: {error}. Download it again.") from error
    finally:
        if bars:
            logging.enable_progress_bar()
    if lacking := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path} lacks {len(lacking)} tensors of {kind.__name__}, for example {lacking[0]}. Download it again."
        )
    return model.to(device).eval().requires_grad_(False)
