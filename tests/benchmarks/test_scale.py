"""A large pair set is checked and trained with some bytes of memory per row, from the manifest to the LoRA file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mapo_core.pairs import lint

if sys.platform == "win32":
    pytest.skip("links to folders, and peak memory by getrusage", allow_module_level=True)

from benchmarks import scale

BYTES_PER_ROW = 300
SLACK = 40e6  # what the parts that are worked on at a time, and the allocator, differ by


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [100_000, 1_000_000])
def test_training_takes_some_bytes_per_row(tmp_path: Path, count: int) -> None:
    small, large = (scale.measure("train", n, tmp_path / str(n)) for n in (1000, count))
    for one, rows in ((small, 1000), (large, count)):
        assert one["pairs"] + one["held_out"] == rows
        assert one["held_out"] > 0
        assert (one["steps"], one["lora"]) == (scale.STEPS, True)
    print(scale.table("train", {1000: small, count: large}))
    assert large["peak"] - small["peak"] < BYTES_PER_ROW * count + SLACK


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [100_000, 1_000_000])
def test_checking_takes_some_bytes_per_row(tmp_path: Path, count: int) -> None:
    small, large = (scale.measure("check", n, tmp_path / str(n)) for n in (1000, count))
    assert (large["pairs"], large["images"]) == (count, count + 1)
    assert (small["looked_at"], large["looked_at"]) == (None, lint.SAMPLE_PAIRS)
    assert large["counts"]["error"] == count // 4  # a quarter of the pairs shows one picture twice
    assert large["findings"] < 10 * lint.TOLD
    print(scale.table("check", {1000: small, count: large}))
    assert large["peak"] - small["peak"] < BYTES_PER_ROW * count + SLACK
