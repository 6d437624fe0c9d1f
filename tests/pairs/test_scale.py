"""Memory against the size of a pair set: some bytes per pair, whatever the number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

CHILD = Path(__file__).with_name("scale_child.py")
ROOT = CHILD.parents[2]
PROMPTS = 200
BYTES_PER_PAIR = 300


def many_rows(folder: Path, count: int) -> Iterator[str]:
    """Pairs of which every chosen image has a path of its own, through links of the folder to itself; a few files."""
    folder.mkdir(exist_ok=True)
    for i in range(4):
        Image.new("RGB", (32 + 8 * (i % 2), 32), (60 * i, 20, 90)).save(folder / f"{i}.png")
    for i in range(100):
        (folder / f"d{i}").symlink_to(".", target_is_directory=True)
    for n in range(count):
        a, b, c = n % 100, n // 100 % 100, n // 10_000
        chosen = f"d{a}/d{b}/d{c}/{n % 4}.png"
        row = {"prompt": f"prompt {n % PROMPTS}", "chosen": str(folder / chosen), "rejected": str(folder / "0.png")}
        yield json.dumps(row) + "\n"


def measure(folder: Path, count: int) -> dict:
    folder.mkdir()
    listing = folder / "pairs.jsonl"
    with listing.open("w") as file:
        file.writelines(many_rows(folder / "images", count))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(CHILD), str(listing), str(folder / "home")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3000, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform == "win32", reason="links to folders, and peak memory by getrusage")
@pytest.mark.parametrize(
    "count",
    [
        20_000,
        pytest.param(100_000, marks=pytest.mark.slow),
        pytest.param(1_000_000, marks=pytest.mark.slow),
    ],
)
def test_a_pair_takes_some_bytes_before_training(tmp_path: Path, count: int) -> None:
    small, large = measure(tmp_path / "small", 1000), measure(tmp_path / "large", count)
    assert (large["pairs"], large["images"] >= count, large["prompt"]) == (
        count,
        True,
        f"prompt {(count - 1) % PROMPTS}",
    )
    assert large["shown"] >= 0.99 * (count - large["held"]) - 16
    for stage, peak in large["peaks"].items():
        print(stage, round((peak - small["peaks"][stage]) / 1e6, 1), "MB more than with 1000 pairs")
    allowed = BYTES_PER_PAIR * count + 8e6  # the parts that are worked on at a time
    assert large["peaks"]["entries"] - small["peaks"]["entries"] < allowed
