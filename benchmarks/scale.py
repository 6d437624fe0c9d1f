"""Memory and time against the size of a pair set: checking it, and training on it.

    python benchmarks/scale.py --rows 1000 100000 1000000

Every figure is of a process of its own. "train": rows that show a few pictures again and again, on the built-in demo
model, from the manifest to the exported LoRA. "check": every row's chosen image has a path of its own (links to a few
pictures), all of which are opened and compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = 200
PICTURES = 16
STEPS = 4


def peak_bytes() -> int:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# --- rows ------------------------------------------------------------------------------------------------------------


def few_pictures(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """Rows of all pairs of a few drawn pictures, again and again; the first eight are held out."""
    from mapo_core.demo.scenes import render, scenes

    folder.mkdir(parents=True)
    for i, scene in zip(range(PICTURES), scenes(7, held_out=False), strict=False):
        for side, style in (("chosen", "neon"), ("rejected", "plain")):
            render(scene, style, 64).save(folder / f"{side}-{i}.png")
    for n in range(count):
        chosen, rejected = n % PICTURES, n // PICTURES % PICTURES
        yield {
            "prompt": f"a star, number {n % PROMPTS}",
            "chosen": str(folder / f"chosen-{chosen}.png"),
            "rejected": str(folder / f"rejected-{rejected}.png"),
            "held_out": n < 8,
        }


def own_paths(folder: Path, count: int) -> Iterator[dict[str, str]]:
    """Rows whose chosen images all have paths of their own, through links of the folder to itself."""
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (64 + 8 * (i % 2), 64), (60 * i, 20, 90)).save(folder / f"{i}.png")
    for i in range(100):
        (folder / f"d{i}").symlink_to(".", target_is_directory=True)
    for n in range(count):
        a, b, c = n % 100, n // 100 % 100, n // 10_000
        chosen = folder / f"d{a}/d{b}/d{c}/{n % 4}.png"
        yield {"prompt": f"prompt {n % PROMPTS}", "chosen": str(chosen), "rejected": str(folder / "0.png")}


# --- what is measured, each in a process of its own ------------------------------------------------------------------


def train_child(listing: Path, home: Path) -> dict[str, Any]:
    """A short training on a manifest; peak memory and time when each phase ends."""
    os.environ["MAPO_HOME"] = str(home)
    import torch

    from mapo_core.config import build_config
    from mapo_core.runs import EventWriter, RequestWatcher, create_run, read_events
    from mapo_core.trainer import train

    torch.set_num_threads(1)
    values: dict[str, Any] = {
        "name": "scale",
        "model": {"path": "demo"},
        "data": {"pairs": "pairs.jsonl", "resolution": 64},
        "adapter": {"rank": 4, "targets": ["attention"]},
        "training": {"steps": STEPS, "train_batch_size": 1, "device": "cpu", "gradient_checkpointing": False},
        "validation": {"every_steps": 0, "draws": 1, "sample_every_steps": 0, "num_inference_steps": 1},
        "checkpoint": {"every_steps": 0},
    }
    marks: list[dict[str, Any]] = []
    started = time.monotonic()

    class Noting(EventWriter):
        def emit(self, type_: Any, step: int | None, **fields: Any) -> None:
            name = fields.get("phase", type_)
            if not marks or marks[-1]["what"] != name:
                marks.append({"what": name, "peak": peak_bytes(), "seconds": time.monotonic() - started})
            super().emit(type_, step, **fields)

    run = create_run("scale", build_config(values).to_json(), listing)
    with Noting(run) as events, RequestWatcher(run) as watcher:
        events.emit("run_started", 0)
        train(run, events, watcher)
    said = read_events(run.events)
    ready = next(e for e in said if e.get("phase") == "ready")
    return {
        "marks": marks,
        "peak": peak_bytes(),
        "seconds": time.monotonic() - started,
        "pairs": ready["pairs"],
        "held_out": ready["held_out_pairs"],
        "steps": sum(e["type"] == "step" for e in said),
        "lora": (run.export / "scale.safetensors").exists(),
    }


def check_child(listing: Path, home: Path) -> dict[str, Any]:
    """The linter on a manifest."""
    os.environ["MAPO_HOME"] = str(home)
    from mapo_core.pairs import lint_pairs, load_pairs

    started = time.monotonic()
    pairs = load_pairs(listing)
    opened = peak_bytes()
    report = lint_pairs(pairs, resolution=64, bucket_step=8)
    return {
        "peak": peak_bytes(),
        "opened": opened,
        "seconds": time.monotonic() - started,
        "pairs": report.pair_count,
        "images": report.image_count,
        "looked_at": report.looked_at,
        "findings": len(report.findings),
        "counts": {level: report.count(level) for level in ("error", "warning", "note")},
    }


CHILDREN = {"train": (train_child, few_pictures), "check": (check_child, own_paths)}


def measure(what: str, count: int, folder: Path, timeout_s: float = 3000) -> dict[str, Any]:
    """Peak memory and time of `what` with so many rows."""
    folder.mkdir(parents=True)
    listing = folder / "pairs.jsonl"
    with listing.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in CHILDREN[what][1](folder / "images", count))
    command = [sys.executable, str(Path(__file__).resolve()), "--child", what, str(listing), str(folder / "home")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout_s, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def table(what: str, found: dict[int, dict[str, Any]]) -> str:
    """As Markdown: peak memory and seconds by number of rows."""
    base = found[min(found)]["peak"]
    lines = [
        f"| {what}, rows | peak memory | more than with {min(found)} rows | per row | time |",
        "|---|---|---|---|---|",
    ]
    for count, one in found.items():
        more = one["peak"] - base
        each = f"{more / (count - min(found)):.0f} B" if count > min(found) else ""
        lines.append(
            f"| {count} | {one['peak'] / 1e6:.0f} MB | {more / 1e6:.0f} MB | {each} | {one['seconds']:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 100_000, 1_000_000])
    parser.add_argument("--what", choices=list(CHILDREN), nargs="+", default=list(CHILDREN))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, listing, home = args.child
        print(json.dumps(CHILDREN[what][0](Path(listing), Path(home))))
        return
    print(f"{date.today()}, {platform.machine()}, {os.cpu_count()} CPU cores")
    for what in args.what:
        found = {}
        for count in args.rows:
            with tempfile.TemporaryDirectory() as folder:
                found[count] = measure(what, count, Path(folder) / "scale")
            print(json.dumps({"what": what, "rows": count, **found[count]}), flush=True)
        print(table(what, found), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
