"""Aspect buckets: which size an image is trained at, and how it is fitted to it. No torch, no files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

Size = tuple[int, int]  # (width, height), pixels


@dataclass(frozen=True)
class Fit:
    """How an image is brought to its bucket: scaled to cover it without distortion, then cropped in the middle.

    Attributes:
        resized: (width, height) after scaling, at least the bucket in both directions, pixels.
        left, top: corner of the crop in the resized image, pixels.
        lost: share of the image's area that the crop removes, 0-1.
    """

    resized: Size
    left: int
    top: int
    lost: float


@lru_cache(maxsize=64)
def bucket_sizes(resolution: int, step: int = 64, max_aspect: float = 2.0) -> tuple[Size, ...]:
    """All buckets of at most `resolution` squared pixels, every side a multiple of `step`.

    Args:
        resolution: side of the square bucket, pixels.
        step: granularity of the sides, pixels.
        max_aspect: longest allowed side ratio.

    Returns:
        (width, height) from the tallest to the widest; the square is among them.
    """
    square = resolution // step * step
    sizes = {(square, square)}
    for short in range(step, square + 1, step):
        long = int(resolution * resolution / short) // step * step
        if long / short <= max_aspect:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda s: s[0] / s[1]))


def nearest_bucket(size: Size, sizes: tuple[Size, ...]) -> Size:
    """The bucket whose aspect ratio is nearest to the image's (in log), the larger one of equals."""
    aspect = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - aspect), 9), -s[0] * s[1]))


def fit(size: Size, bucket: Size) -> Fit:
    """Scale `size` to cover `bucket` without distortion, and crop the middle."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    resized = (max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale)))
    kept = bucket[0] * bucket[1] / (resized[0] * resized[1])
    return Fit(resized, (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2, 1 - kept)
