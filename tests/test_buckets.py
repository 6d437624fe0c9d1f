"""Buckets and crops."""

from __future__ import annotations

import pytest

from mapo_core.buckets import bucket_sizes, fit, nearest_bucket


def test_buckets_of_sdxl() -> None:
    sizes = bucket_sizes(1024, 64, 2.0)
    assert (1024, 1024) in sizes
    assert all(w % 64 == 0 and h % 64 == 0 and w * h <= 1024 * 1024 for w, h in sizes)
    assert all(max(w, h) / min(w, h) <= 2.0 for w, h in sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)


@pytest.mark.parametrize(
    ("size", "bucket"),
    [((1000, 1000), (1024, 1024)), ((3000, 2000), (1216, 832)), ((2000, 3000), (832, 1216)), ((100, 900), (768, 1344))],
)
def test_nearest_bucket(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    assert nearest_bucket(size, bucket_sizes(1024, 64, 2.0)) == bucket


def test_fit_covers_the_bucket_without_distortion_and_crops_the_middle() -> None:
    how = fit((2000, 1000), (512, 512))
    assert how.resized == (1024, 512)
    assert (how.left, how.top) == (256, 0)
    assert how.lost == pytest.approx(0.5)
    assert fit((512, 512), (512, 512)).lost == 0
    small = fit((10, 20), (512, 512))
    assert small.resized == (512, 1024)
