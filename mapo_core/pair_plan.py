"""Bucket, crop and cache key of every image of a pair set: a few bytes per pair, the rest is made when asked for."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, overload

import numpy as np

from .buckets import Fit, Size, fit, nearest_bucket
from .errors import PairsError
from .families.base import ImageGeometry
from .masks import MaskSource, mask_source
from .pairs.images import image_size
from .pairs.scores import score_range

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from .config import TrainConfig
    from .pairs import PreferencePair

_AT_A_TIME = 1024
_MASKS = 50_000  # masks that are remembered


@dataclass(frozen=True)
class ImageEntry:
    """Where one image's latents are, and what the model is told about its size."""

    path: Path
    fit: Fit
    geometry: ImageGeometry
    key: str
    flipped_key: str | None
    mask: MaskSource | None = None


@dataclass(frozen=True)
class PairEntry:
    """A pair, ready to be read from the cache."""

    bucket: Size
    chosen: ImageEntry
    rejected: ImageEntry
    prompt: str
    rejected_prompt: str
    weight: float
    base_prompt: str | None = None
    scores: tuple[float, float] | None = None  # of chosen and rejected, min-max normalised over the set


class Images:
    """The different image files of a set, numbered in the order in which they come, and what was read of them.

    Attributes:
        numbers: of each pair's chosen and rejected image, [N, 2] int32.
        first: where each image comes first, 2 x pair + (0 chosen, 1 rejected), [M] int64.
        sha256: of the files, [M, 32] uint8.
        sizes: (width, height) upright, pixels, [M, 2] int32.
    """

    def __init__(self, pairs: Sequence[PreferencePair], progress: Callable[[str, int, int], None]) -> None:
        names = array("Q")
        for path in _paths(pairs):
            # Files are told apart by 64 bits of their path's hash: among 10^7, two are mixed up once in 10^5 sets.
            name = str(path).encode(errors="surrogateescape")
            names.append(int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()))
        _, first, numbers = np.unique(np.frombuffer(names, np.uint64), return_index=True, return_inverse=True)
        order = np.argsort(first)
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        self.first: np.ndarray = first[order]
        self.numbers: np.ndarray = place[numbers.reshape(-1)].reshape(-1, 2)
        self.sha256 = np.empty((len(order), 32), np.uint8)
        self.sizes = np.empty((len(order), 2), np.int32)
        self._read(pairs, progress)

    def _read(self, pairs: Sequence[PreferencePair], progress: Callable[[str, int, int], None]) -> None:
        is_first = np.zeros(2 * len(pairs), bool)
        is_first[self.first] = True
        files = (path for path, new in zip(_paths(pairs), is_first, strict=True) if new)
        done = 0
        with ThreadPoolExecutor(4) as pool:
            while part := list(islice(files, _AT_A_TIME)):
                for digest, size in pool.map(_read_file, part):
                    self.sha256[done] = np.frombuffer(digest, np.uint8)
                    self.sizes[done] = size
                    if done % 100 == 0:
                        progress("reading images", done, len(self.first))
                    done += 1

    def __len__(self) -> int:
        return len(self.first)

    def size(self, number: int) -> Size:
        """(width, height) of an image, pixels."""
        width, height = self.sizes[number].tolist()
        return width, height


def _paths(pairs: Iterable[PreferencePair]) -> Iterator[Path]:
    for pair in pairs:
        yield pair.chosen
        yield pair.rejected


def _read_file(path: Path) -> tuple[bytes, Size]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise PairsError(
            f"Image cannot be read: {path} ({error.strerror}). It was there when the pairs were made; put it back, or "
            "make the pair set again."
        ) from error
    return digest, image_size(path)


class PairPlan(Sequence[PairEntry]):
    """The entries of a pair set, each made when it is asked for.

    Attributes:
        pairs: the set.
        masked: whether some entries may have a mask.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        images: Images,
        config: TrainConfig,
        sizes: tuple[Size, ...],
        fingerprint: str,
        latent_scale: int = 8,
    ) -> None:
        """Decide the buckets.

        Args:
            pairs: the set.
            images: of it.
            config: of the run; flip, masks and cache precision matter here.
            sizes: of the buckets.
            fingerprint: of the VAE.
            latent_scale: pixels per latent.
        """
        nearest = lru_cache(None)(lambda size: sizes.index(nearest_bucket(size, sizes)))
        of_image = np.fromiter((nearest(images.size(n)) for n in range(len(images))), np.uint16, len(images))
        self.pairs = pairs
        self._images = images
        self._sizes = sizes
        self._buckets: np.ndarray = of_image[images.numbers[:, 0]]  # a pair is trained in its chosen image's
        self._flip = config.data.flip
        self._common = (fingerprint, config.cache.precision)
        self._scores = score_range(pairs)
        wanted = config.loss.mask
        self._mask_of = lru_cache(_MASKS)(
            lambda mask, path, size, how, bucket: mask_source(mask, path, wanted, size, how, bucket, latent_scale)
        )
        self.masked = wanted == "alpha" or (wanted == "file" and any(p.chosen_mask or p.rejected_mask for p in pairs))

    def __len__(self) -> int:
        """How many pairs there are."""
        return len(self._buckets)

    @overload
    def __getitem__(self, index: int) -> PairEntry: ...
    @overload
    def __getitem__(self, index: slice) -> list[PairEntry]: ...
    def __getitem__(self, index: int | slice) -> PairEntry | list[PairEntry]:
        """The entry of a pair, or those of some."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        pair = self.pairs[index]
        bucket = int(self._buckets[index])
        chosen, rejected = self._images.numbers[index].tolist()
        return PairEntry(
            self._sizes[bucket],
            self._entry(pair.chosen, chosen, bucket, pair.chosen_mask),
            self._entry(pair.rejected, rejected, bucket, pair.rejected_mask),
            pair.prompt,
            pair.prompt if pair.rejected_prompt is None else pair.rejected_prompt,
            pair.weight,
            pair.base_prompt,
            self._normalised(pair),
        )

    def bucket(self, index: int) -> Size:
        """(width, height) of a pair, pixels, without reading the pair."""
        return self._sizes[self._buckets[index]]

    def images_by_bucket(self) -> np.ndarray:
        """Every image in every bucket that it is trained at, once: numbers for `image`, in the order of the set."""
        numbers, buckets = self._images.numbers.astype(np.int64), self._buckets.astype(np.int64)
        return np.unique(numbers * len(self._sizes) + buckets[:, None])

    def image(self, code: int) -> tuple[ImageEntry, Size]:
        """An image and its bucket, by a number of `images_by_bucket`."""
        number, bucket = divmod(int(code), len(self._sizes))
        pair, side = divmod(int(self._images.first[number]), 2)
        path = self.pairs[pair].rejected if side else self.pairs[pair].chosen
        return self._entry(path, number, bucket, None, encoding=True), self._sizes[bucket]

    def _entry(self, path: Path, number: int, bucket: int, mask: Path | None, *, encoding: bool = False) -> ImageEntry:
        size, target = self._images.size(number), self._sizes[bucket]
        how = fit(size, target)
        geometry = ImageGeometry((size[1], size[0]), (how.top, how.left), (target[1], target[0]))
        base = ("image", self._images.sha256[number].tobytes().hex(), target, asdict(how), *self._common)
        flipped = digest_of(*base, "flipped") if self._flip else None
        source = self._mask_of(mask, path, size, how, target) if self.masked and not encoding else None
        return ImageEntry(path, how, geometry, digest_of(*base), flipped, source)

    def _normalised(self, pair: PreferencePair) -> tuple[float, float] | None:
        if self._scores is None:
            return None
        low, span = self._scores
        assert pair.chosen_score is not None, "score_range says None where one is missing"
        assert pair.rejected_score is not None, "score_range says None where one is missing"
        return (pair.chosen_score - low) / span, (pair.rejected_score - low) / span


def digest_of(*parts: object) -> str:
    """A key from numbers and words."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
