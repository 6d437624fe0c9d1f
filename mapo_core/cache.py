"""Encode every image and prompt once, keep it on disk, and hand out what one showing of a pair needs."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import torch

from .buckets import Fit, Size, bucket_sizes
from .cache_space import bytes_of, check_space
from .devices import DTYPES
from .disk_cache import DiskCache
from .masks import MaskCache
from .pair_plan import ImageEntry, Images, PairEntry, PairPlan, digest_of
from .pairs.images import prepare_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from .config import TrainConfig
    from .families.base import DiffusionModel, Family
    from .masks import MaskSource
    from .pairs import PreferencePair

Progress = "Callable[[str, int, int], None]"  # what is done, how many are, of how many

_CHUNK_PIXELS = 512 * 512  # images encoded together have at most about this many pixels
_SHARD_ENTRIES = 64
_PART = 4096  # prompts or images that are looked up together

Item = TypeVar("Item")
Work = dict[str, tuple[ImageEntry, Size, bool]]  # key -> image, bucket, whether mirrored

__all__ = ["EncodedPairs", "ImageEntry", "PairEntry", "PromptCache", "encode_pairs", "pair_buckets"]


class EncodedPairs:
    """The pair set behind its cache.

    Attributes:
        entries: one per pair, in the order of the pair set; made when asked for.
        latent_scale: pixels per latent.
    """

    def __init__(
        self, entries: PairPlan, latents: DiskCache, prompts: PromptCache, latent_scale: int, masks: MaskCache
    ) -> None:
        self.entries = entries
        self.latent_scale = latent_scale
        self._latents = latents
        self._prompts = prompts
        self._masks = masks

    @property
    def buckets(self) -> list[Size]:
        """The (width, height) of every pair, pixels."""
        return [self.entries.bucket(i) for i in range(len(self.entries))]

    def bucket(self, index: int) -> Size:
        """The (width, height) of a pair, pixels."""
        return self.entries.bucket(index)

    def latent_shape(self, index: int) -> tuple[int, int, int]:
        """Shape of a pair's latents, (4, h, w)."""
        width, height = self.entries.bucket(index)
        return (4, height // self.latent_scale, width // self.latent_scale)

    def latents(self, image: ImageEntry, latent_noise: Tensor, flip: bool = False) -> Tensor:
        """One sample of the image's posterior, [4, h, w] float32."""
        key = image.flipped_key if flip else image.key
        assert key is not None, "the set was encoded without flipping"
        stored = self._latents.get(key)
        return stored["mean"].float() + stored["std"].float() * latent_noise

    def mask(self, image: ImageEntry, flip: bool = False) -> Tensor | None:
        """How much each place of the image counts, [1, h, w] float32 in 0-1; None: all alike."""
        return None if image.mask is None else self._masks.get(image.mask, flip)

    def shards_used(self) -> dict[str, list[str]]:
        """Names of the cache's files that this set needs, by kind."""
        return {
            "latents": self._latents.shards_used(),
            "prompts": self._prompts.shards_used(),
            "masks": self._masks.shards_used(),
        }

    def prompt(self, prompt: str) -> dict[str, Tensor]:
        """The embeddings of a prompt of the set, or of the empty one."""
        return self._prompts.get(prompt)


class PromptCache:
    """Prompt embeddings by text, as the base model's text encoders give them.

    Args:
        cache: where they are kept.
        fingerprint: of the text encoders and their settings.
        precision: "fp32" or "bf16".
        new_tokens: of the settings; their placeholders are replaced by the words that they start from.
    """

    def __init__(self, cache: DiskCache, fingerprint: str, precision: str, new_tokens: Sequence[str] = ()) -> None:
        self._new_tokens = new_tokens
        self._cache = cache
        self._prefix = f"{fingerprint}/{precision}"
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def get(self, prompt: str) -> dict[str, Tensor]:
        """The stored embeddings, float32.

        Raises:
            KeyError: `encode` was not called for it.
        """
        return {name: tensor.float() for name, tensor in self._cache.get(self._key(prompt)).items()}

    def encode(self, model: DiffusionModel, family: Family, prompts: Iterable[str], progress: Callable) -> None:
        """Store what is missing.

        Args:
            model: with its text encoders.
            family: of the model.
            prompts: may be gone through several times, and need not fit into memory.
            progress: as of `encode_pairs`.
        """
        from .adapter import encode_prompts  # peft; reading a plan of pairs does not need it
        from .new_tokens import class_prompt

        seen: set[int] = set()
        missing: set[int] = set()
        fresh = (p for p in prompts if not (_short_hash(p) in seen or seen.add(_short_hash(p))))
        for part in _parts(fresh, _PART):
            by_key = {self._key(p): p for p in part}
            missing.update(_short_hash(by_key[key]) for key in self._cache.missing(by_key))
        done, total = 0, len(missing)
        for part in _parts((p for p in prompts if _short_hash(p) in missing), _SHARD_ENTRIES):
            wanted = list(dict.fromkeys(part))
            progress("encoding prompts", done, total)
            embeds = encode_prompts(model, family, [class_prompt(p, self._new_tokens) for p in wanted], base=True)
            stored = ({n: t.to(self._dtype) for n, t in e.items()} for e in embeds)
            ready = dict(zip(map(self._key, wanted), stored, strict=True))
            if done == 0:
                check_space(self._cache.folder, total * bytes_of(ready) // len(ready), "prompts")
            self._cache.put(ready)
            done += len(wanted)
            missing.difference_update(map(_short_hash, wanted))
        if total:
            progress("encoding prompts", total, total)

    def shards_used(self) -> list[str]:
        """Names of the files with prompts that were looked up or written."""
        return self._cache.shards_used()

    def _key(self, prompt: str) -> str:
        from .new_tokens import class_prompt

        return digest_of("prompt", self._prefix, class_prompt(prompt, self._new_tokens))


def encode_pairs(
    model: DiffusionModel,
    family: Family,
    pairs: Sequence[PreferencePair],
    config: TrainConfig,
    folder: Path,
    *,
    extra_prompts: Iterable[str] = (),
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[EncodedPairs, PromptCache]:
    """Encode what is not in the cache yet.

    Args:
        model: with its VAE and text encoders.
        family: of the model.
        pairs: the checked set.
        config: of the run; resolution, buckets, flip and cache precision matter here.
        folder: of the caches, shared between runs.
        extra_prompts: prompts beside those of the pairs, for example for validation pictures.
        progress: called with what is encoded, how many are done and how many there are.
    """
    fingerprint = f"{model.fingerprint}/{json.dumps(model.extras, sort_keys=True, default=str)}"
    about = {"model": config.model.path, "family": family.name, "precision": config.cache.precision}
    kept = DiskCache(folder / "prompts", about)
    prompts = PromptCache(kept, fingerprint, config.cache.precision, config.adapter.new_tokens)
    prompts.encode(model, family, PromptsOf(pairs, ("", *extra_prompts)), progress)

    sizes = pair_buckets(config, model.resolution, model.latent_scale)
    entries = PairPlan(pairs, Images(pairs, progress), config, sizes, model.fingerprint, model.latent_scale)
    latents = DiskCache(folder / "latents", about)
    masks = MaskCache(DiskCache(folder / "masks", {"precision": "fp32"}), config.loss.mask_floor)
    codes, total, needed = _missing_images(entries, latents, model.latent_scale, DTYPES[config.cache.precision])
    if entries.masked:
        needed += masks.missing_bytes(MasksOf(entries), model.latent_scale)
    check_space(folder, needed, "images and masks" if entries.masked else "images")
    if entries.masked:  # first: they are quick, and what is wrong with one is said before images are encoded for hours
        masks.prepare(MasksOf(entries), model.latent_scale)
    _encode_images(model, family, entries, latents, codes, total, DTYPES[config.cache.precision], progress)
    return EncodedPairs(entries, latents, prompts, model.latent_scale, masks), prompts


class PromptsOf:
    """The prompts of a set and some more, as often as they are gone through."""

    def __init__(self, pairs: Iterable[PreferencePair], extra: Sequence[str]) -> None:
        self._pairs = pairs
        self._extra = extra

    def __iter__(self) -> Iterator[str]:
        yield from self._extra
        for pair in self._pairs:
            yield from (p for p in (pair.prompt, pair.rejected_prompt, pair.base_prompt) if p is not None)


class MasksOf:
    """The masks of a set with what their images are fitted to, as often as they are gone through."""

    def __init__(self, entries: PairPlan) -> None:
        self._entries = entries

    def __iter__(self) -> Iterator[tuple[MaskSource | None, Fit, Size]]:
        return ((image.mask, image.fit, e.bucket) for e in self._entries for image in (e.chosen, e.rejected))


def pair_buckets(config: TrainConfig, native_resolution: int, latent_scale: int = 8) -> tuple[Size, ...]:
    """The sizes that a run trains at, (width, height) in pixels."""
    resolution = config.data.resolution or native_resolution
    if not config.data.bucket:
        side = resolution // latent_scale * latent_scale
        return ((side, side),)
    step = config.data.bucket_step or max(8, min(64, resolution // 8 // 8 * 8))
    return bucket_sizes(resolution, step, config.data.max_aspect)


def _encode_images(
    model: DiffusionModel,
    family: Family,
    entries: PairPlan,
    cache: DiskCache,
    codes: array[int],
    total: int,
    dtype: torch.dtype,
    progress: Callable[[str, int, int], None],
) -> None:
    """Encode what is missing, as `_missing_images` found it, some thousand images at a time, those of a bucket
    together."""
    done = 0
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(codes), _PART):
            work = _work_of(entries, codes[start : start + _PART])
            work = {key: work[key] for key in cache.missing(work)}

            def tell(count: int, before: int = done) -> None:
                progress("encoding images", before + count, total)

            _encode_part(model, family, work, cache, dtype, pool, tell)
            done += len(work)


def _work_of(entries: PairPlan, codes: Iterable[int]) -> Work:
    """The images with these numbers by their keys, each mirrored too if the set is."""
    work: Work = {}
    for code in codes:
        image, bucket = entries.image(code)
        work[image.key] = (image, bucket, False)
        if image.flipped_key is not None:
            work[image.flipped_key] = (image, bucket, True)
    return work


def _missing_images(
    entries: PairPlan, cache: DiskCache, latent_scale: int, dtype: torch.dtype
) -> tuple[array[int], int, int]:
    """Numbers of the images that are not in the cache whole; how many entries they lack, and the bytes of those."""
    codes, lacking, pixels = array("q"), 0, 0
    for part in _parts(entries.images_by_bucket().tolist(), _PART):
        of_key = {key: code for code in part for key in _work_of(entries, [code])}
        missing = cache.missing(of_key)
        codes.extend(dict.fromkeys(of_key[key] for key in missing))
        lacking += len(missing)
        pixels += sum(w * h for w, h in (entries.image(of_key[key])[1] for key in missing))
    values = 2 * 4 / latent_scale**2  # mean and spread of four channels, per pixel
    return codes, lacking, int(pixels * values * dtype.itemsize)


def _encode_part(
    model: DiffusionModel,
    family: Family,
    work: Work,
    cache: DiskCache,
    dtype: torch.dtype,
    pool: ThreadPoolExecutor,
    tell: Callable[[int], None],
) -> None:
    by_bucket: dict[Size, list[str]] = defaultdict(list)
    for key, (_, bucket, _) in work.items():
        by_bucket[bucket].append(key)
    ready: dict[str, dict[str, Tensor]] = {}
    done = 0
    for bucket, keys in by_bucket.items():
        size = max(1, min(32, _CHUNK_PIXELS // (bucket[0] * bucket[1])))
        chunks = [keys[i : i + size] for i in range(0, len(keys), size)]
        following = _read(pool, chunks[0], work)
        for i, chunk in enumerate(chunks):
            pixels = torch.stack([torch.from_numpy(f.result().copy()) for f in following])
            following = _read(pool, chunks[i + 1], work) if i + 1 < len(chunks) else []
            x = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1  # [B, 3, H, W], pixels [-1, 1]
            mean, std = family.encode_images(model, x)
            for k, m, s in zip(chunk, mean.to("cpu", dtype), std.to("cpu", dtype), strict=True):
                ready[k] = {"mean": m, "std": s}
            done += len(chunk)
            if len(ready) >= _SHARD_ENTRIES:
                cache.put(ready)
                ready = {}
            tell(done)
    cache.put(ready)


def _read(pool: ThreadPoolExecutor, keys: Sequence[str], work: Work) -> list:
    """Start decoding images while the device is busy with those before."""
    return [pool.submit(prepare_image, w[0].path, w[0].fit, w[1], w[2]) for w in (work[k] for k in keys)]


def _parts(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    waiting = iter(items)
    while part := list(islice(waiting, size)):
        yield part


def _short_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())
