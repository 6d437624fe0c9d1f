"""Goes through a pair set as a run does before it trains, and prints the peak memory after each stage, bytes."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

from mapo_core.config import build_config
from mapo_core.data_order import divide_pairs, step_groups
from mapo_core.pair_plan import Images, PairPlan
from mapo_core.pairs import open_pairs
from mapo_core.runs import create_run

path, home = Path(sys.argv[1]), Path(sys.argv[2])
peaks = {}


def stage(name: str) -> None:
    """Note the peak so far."""
    peaks[name] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


config = build_config({"name": "scale", "model": {"path": "demo"}, "data": {"pairs": "pairs.jsonl", "resolution": 32}})
stage("start")
pairs = open_pairs(path)
stage("open")
run = create_run("scale", config.to_json(), path, home)
stage("run folder")
train, held = divide_pairs(pairs, 0.1, 0)
stage("split")
plan = PairPlan(pairs, Images(pairs, lambda *_: None), config, ((32, 32), (40, 24)), "fingerprint")
stage("plan")
buckets = [plan.bucket(i) for i in train]
groups = step_groups(buckets, 16, 0)
shown = bytearray(len(train))
for _ in range(len(train) // 16):
    for draw in next(groups):
        shown[draw.index] = 1
stage("order")
codes = plan.images_by_bucket()
entry = plan[len(plan) - 1]
stage("entries")
facts = {"pairs": len(plan), "held": len(held), "images": len(codes), "shown": sum(shown), "prompt": entry.prompt}
print(json.dumps({"peaks": peaks, **facts}))
