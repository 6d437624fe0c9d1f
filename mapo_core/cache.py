"""Encode every image and prompt once, keep it on disk, and hand out what one showing of a pair needs."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from .buckets import Fit, Size, bucket_sizes, fit, nearest_bucket
from .disk_cache import DiskCache
from .families.base import ImageGeometry
from .masks import MaskCache, MaskSource, mask_source
from .pairs.images import image_size, prepare_image
from .pairs.scores import normalised_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from torch import Tensor

    from .config import TrainConfig
    from .families.base import DiffusionModel, Family
    from .pairs import PreferencePair

Progress = "Callable[[str, int, int], None]"  # what is done, how many are, of how many

_CHUNK_PIXELS = 512 * 512  # images encoded together have at most about this many pixels
_SHARD_ENTRIES = 64


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


class EncodedPairs:
    """The pair set behind its cache.

    Attributes:
        entries: one per pair, in the order of the pair set.
        latent_scale: pixels per latent.
    """

    def __init__(
        self,
        entries: Sequence[PairEntry],
        latents: DiskCache,
        prompts: PromptCache,
        latent_scale: int,
        masks: MaskCache,
    ) -> None:
        self.entries = entries
        self.latent_scale = latent_scale
        self._latents = latents
        self._prompts = prompts
        self._masks = masks

    @property
    def buckets(self) -> list[Size]:
        """The (width, height) of every pair, pixels."""
        return [e.bucket for e in self.entries]

    def latent_shape(self, index: int) -> tuple[int, int, int]:
        """Shape of a pair's latents, (4, h, w)."""
        width, height = self.entries[index].bucket
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
        """Store what is missing."""
        from .adapter import encode_prompts  # peft; reading a plan of pairs does not need it
        from .new_tokens import class_prompt

        by_key = {self._key(p): class_prompt(p, self._new_tokens) for p in prompts}
        missing = self._cache.missing(by_key)
        for start in range(0, len(missing), _SHARD_ENTRIES):
            progress("encoding prompts", start, len(missing))
            part = missing[start : start + _SHARD_ENTRIES]
            embeds = encode_prompts(model, family, [by_key[k] for k in part], base=True)
            self._cache.put(
                {k: {n: t.to(self._dtype) for n, t in e.items()} for k, e in zip(part, embeds, strict=True)}
            )
        if missing:
            progress("encoding prompts", len(missing), len(missing))

    def _key(self, prompt: str) -> str:
        from .new_tokens import class_prompt

        return _digest("prompt", self._prefix, class_prompt(prompt, self._new_tokens))


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
    prompts = PromptCache(DiskCache(folder / "prompts"), fingerprint, config.cache.precision, config.adapter.new_tokens)
    wanted = [p for pair in pairs for p in (pair.prompt, pair.rejected_prompt, pair.base_prompt) if p is not None]
    prompts.encode(model, family, ["", *wanted, *extra_prompts], progress)

    sizes = pair_buckets(config, model.resolution, model.latent_scale)
    entries = plan_pairs(pairs, config, sizes, model.fingerprint, progress, model.latent_scale)
    latents = DiskCache(folder / "latents")
    _encode_images(model, family, entries, latents, config, progress)
    masks = MaskCache(DiskCache(folder / "masks"), config.loss.mask_floor)
    masks.prepare(((i.mask, i.fit, e.bucket) for e in entries for i in (e.chosen, e.rejected)), model.latent_scale)
    return EncodedPairs(entries, latents, prompts, model.latent_scale, masks), prompts


def pair_buckets(config: TrainConfig, native_resolution: int, latent_scale: int = 8) -> tuple[Size, ...]:
    """The sizes that a run trains at, (width, height) in pixels."""
    resolution = config.data.resolution or native_resolution
    if not config.data.bucket:
        side = resolution // latent_scale * latent_scale
        return ((side, side),)
    step = config.data.bucket_step or max(8, min(64, resolution // 8 // 8 * 8))
    return bucket_sizes(resolution, step, config.data.max_aspect)


def plan_pairs(
    pairs: Sequence[PreferencePair],
    config: TrainConfig,
    sizes: tuple[Size, ...],
    fingerprint: str,
    progress: Callable[[str, int, int], None],
    latent_scale: int = 8,
) -> list[PairEntry]:
    """Decide bucket, crop and cache key of every image; reads files, encodes nothing."""
    paths = list(dict.fromkeys(path for pair in pairs for path in (pair.chosen, pair.rejected)))
    hashes: dict[Path, str] = {}
    with ThreadPoolExecutor(4) as pool:
        for i, (path, digest) in enumerate(zip(paths, pool.map(_file_hash, paths), strict=True)):
            hashes[path] = digest
            if i % 100 == 0:
                progress("reading images", i, len(paths))
    originals = {path: image_size(path) for path in paths}

    def entry(path: Path, bucket: Size, mask: Path | None) -> ImageEntry:
        how = fit(originals[path], bucket)
        width, height = originals[path]
        geometry = ImageGeometry((height, width), (how.top, how.left), (bucket[1], bucket[0]))
        base = ("image", hashes[path], bucket, asdict(how), fingerprint, config.cache.precision)
        flipped = _digest(*base, "flipped") if config.data.flip else None
        source = mask_source(mask, path, config.loss.mask, originals[path], how, bucket, latent_scale)
        return ImageEntry(path, how, geometry, _digest(*base), flipped, source)

    scores = normalised_scores(pairs)
    entries: list[PairEntry] = []
    for number, pair in enumerate(pairs):
        bucket = nearest_bucket(originals[pair.chosen], sizes)
        rejected_prompt = pair.prompt if pair.rejected_prompt is None else pair.rejected_prompt
        chosen = entry(pair.chosen, bucket, pair.chosen_mask)
        rejected = entry(pair.rejected, bucket, pair.rejected_mask)
        entries.append(
            PairEntry(
                bucket,
                chosen,
                rejected,
                pair.prompt,
                rejected_prompt,
                pair.weight,
                pair.base_prompt,
                scores[number] if scores else None,
            )
        )
    return entries


def _encode_images(
    model: DiffusionModel,
    family: Family,
    entries: Sequence[PairEntry],
    cache: DiskCache,
    config: TrainConfig,
    progress: Callable[[str, int, int], None],
) -> None:
    work: dict[str, tuple[ImageEntry, Size, bool]] = {}
    for pair in entries:
        for image in (pair.chosen, pair.rejected):
            work[image.key] = (image, pair.bucket, False)
            if image.flipped_key is not None:
                work[image.flipped_key] = (image, pair.bucket, True)
    missing = cache.missing(work)
    by_bucket: dict[Size, list[str]] = defaultdict(list)
    for key in missing:
        by_bucket[work[key][1]].append(key)
    dtype = torch.bfloat16 if config.cache.precision == "bf16" else torch.float32
    ready: dict[str, dict[str, Tensor]] = {}
    done = 0
    with ThreadPoolExecutor(4) as pool:
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
                progress("encoding images", done, len(missing))
    cache.put(ready)


def _read(pool: ThreadPoolExecutor, keys: Sequence[str], work: dict[str, tuple[ImageEntry, Size, bool]]) -> list:
    """Start decoding images while the device is busy with those before."""
    return [pool.submit(prepare_image, w[0].path, w[0].fit, w[1], w[2]) for w in (work[k] for k in keys)]


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
