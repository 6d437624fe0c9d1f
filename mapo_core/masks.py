"""Masks of the images, brought to the size of their latents once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from .errors import PairsError
from .pairs.images import image_size
from .pairs.lint import MASK_TOLERANCE
from .pairs.masks import has_transparency, mask_grid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from typing import Literal

    from torch import Tensor

    from .buckets import Fit, Size
    from .disk_cache import DiskCache

    MaskJob = tuple["MaskSource | None", Fit, Size]  # a mask, and how its image is fitted to its bucket

_SHARD_ENTRIES = 256
_VALUE_BYTES = 4  # float32


@dataclass(frozen=True)
class MaskSource:
    """Where an image's mask is.

    Attributes:
        path: a greyscale image, or the image itself.
        alpha: it is the image's transparency.
        key: in the cache.
    """

    path: Path
    alpha: bool
    key: str


def mask_source(
    mask: Path | None,
    image: Path,
    wanted: Literal["file", "alpha", "off"],
    image_size_: Size,
    fit: Fit,
    bucket: Size,
    latent_scale: int,
) -> MaskSource | None:
    """The mask of an image, if it has one and it is wanted.

    Args:
        mask: the file that the pair names.
        image: the image.
        wanted: `LossConfig.mask`.
        image_size_: (width, height) of the image, upright, pixels.
        fit: of the image to its bucket; the mask gets the same.
        bucket: (width, height), pixels.
        latent_scale: pixels per latent.

    Raises:
        PairsError: the mask is missing, cannot be read, or has another shape than the image.
    """
    if wanted == "off":
        return None
    alpha = mask is None
    if alpha and (wanted != "alpha" or not has_transparency(image)):
        return None
    path = image if mask is None else mask
    width, height = image_size(path)
    if not alpha and abs(width / height * image_size_[1] / image_size_[0] - 1) > MASK_TOLERANCE:
        raise PairsError(
            f"The mask {path} is {width} x {height} pixels and its image {image} {image_size_[0]} x {image_size_[1]}: "
            "they must have the same shape. Save the mask at the size of the image."
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    parts = json.dumps(["mask", digest, alpha, bucket, asdict(fit), latent_scale], sort_keys=True)
    return MaskSource(path, alpha, hashlib.sha256(parts.encode()).hexdigest())


class MaskCache:
    """Masks by key.

    Args:
        cache: where they are kept.
        floor: how much what is outside a mask counts, 0-1.
    """

    def __init__(self, cache: DiskCache, floor: float = 0.0) -> None:
        self._cache = cache
        self._floor = floor

    def missing_bytes(self, masks: Iterable[MaskJob], latent_scale: int) -> int:
        """Disk that the masks will take that are not stored yet, bytes; `masks` need not fit into memory."""
        return sum(
            (bucket[0] // latent_scale) * (bucket[1] // latent_scale) * _VALUE_BYTES
            for part in self._missing(masks)
            for _, _, bucket in part.values()
        )

    def prepare(self, masks: Iterable[MaskJob], latent_scale: int) -> None:
        """Store what is missing; `masks` need not fit into memory.

        Raises:
            PairsError: a mask cannot be read or is black everywhere in its crop.
        """
        for part in self._missing(masks):
            ready = {}
            for key, (mask, fit, bucket) in part.items():
                grid = mask_grid(mask.path, fit, bucket, latent_scale, alpha=mask.alpha)
                ready[key] = {"mask": torch.from_numpy(grid)}
            self._cache.put(ready)

    def shards_used(self) -> list[str]:
        """Names of the files with masks that were looked up or written."""
        return self._cache.shards_used()

    def _missing(self, masks: Iterable[MaskJob]) -> Iterator[dict[str, tuple[MaskSource, Fit, Size]]]:
        """What is not stored, each once, some at a time: key -> mask, fit and bucket."""
        seen: set[int] = set()  # 64 bits of each key
        waiting: dict[str, tuple[MaskSource, Fit, Size]] = {}
        for mask, fit, bucket in masks:
            if mask is None or (short := int(mask.key[:16], 16)) in seen:
                continue
            seen.add(short)
            if self._cache.missing([mask.key]):
                waiting[mask.key] = (mask, fit, bucket)
            if len(waiting) == _SHARD_ENTRIES:
                yield waiting
                waiting = {}
        if waiting:
            yield waiting

    def get(self, mask: MaskSource, flip: bool = False) -> Tensor:
        """A mask, [1, h, w] float32 in 0-1, mirrored if `flip`."""
        stored = self._cache.get(mask.key)["mask"][None]
        found = self._floor + (1 - self._floor) * stored
        return found.flip(-1) if flip else found
