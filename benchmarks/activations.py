"""What a forward pass keeps for its backward pass, counted tensor by tensor; works the same on the CPU and on a GPU.

python benchmarks/activations.py    # joint and split pairs on the demo model, one to two minutes
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import weakref
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mapo_core import build_config
from mapo_core.backward import accumulate
from mapo_core.data_order import Draw
from mapo_core.demo.scenes import render, scenes
from mapo_core.runs import create_run
from mapo_core.session import Session, prepare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor

PAIRS = 8
ROUNDS = 5


class Kept:
    """Bytes that autograd holds for backward passes, now and at most.

    Args:
        parameters: tensors that are there anyway and do not count.
    """

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self.bytes = 0
        self.peak_bytes = 0
        self._own = {p.untyped_storage().data_ptr() for p in parameters}
        self._holders: dict[int, int] = {}  # storage -> how many saved tensors share it

    def pack(self, tensor: Tensor) -> _Saved:
        """Count a tensor that is saved."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        saved = _Saved(tensor)
        if place not in self._own:
            if self._holders.setdefault(place, 0) == 0:
                self.bytes += storage.nbytes()
                self.peak_bytes = max(self.peak_bytes, self.bytes)
            self._holders[place] += 1
            weakref.finalize(saved, self._drop, place, storage.nbytes())
        return saved

    def _drop(self, place: int, size: int) -> None:
        self._holders[place] -= 1
        if self._holders[place] == 0:
            self.bytes -= size


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def kept_for_backward(parameters: Iterable[Tensor] = ()) -> Iterator[Kept]:
    """Count inside; `peak_bytes` is the activation memory of whatever ran.

    Args:
        parameters: of the model, which do not count.
    """
    kept = Kept(parameters)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda saved: saved.tensor):
        yield kept


def main() -> None:
    """Joint and split pairs of MaPO on the demo model: what is kept for backward, and processor time, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MAPO_HOME"] = str(Path(folder) / "home")
        print(f"{'form':<24}{'kept, MiB':>12}{'of joint':>10}{'s a step':>10}{'of joint':>10}")
        for checkpointing in (False, True):
            session, group, buckets = prepared(Path(folder), checkpointing)
            kept_bytes: dict[bool, int] = {}
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for split in (False, True):
                session.split_pairs = split
                with kept_for_backward(session.model.unet.parameters()) as kept:
                    accumulate(session, group, buckets)
                kept_bytes[split] = kept.peak_bytes
            for _ in range(ROUNDS):
                for split in (False, True):
                    session.split_pairs = split
                    start = time.process_time()
                    accumulate(session, group, buckets)
                    seconds[split].append(time.process_time() - start)
            middle = {split: statistics.median(times) for split, times in seconds.items()}
            for split in (False, True):
                name = ("split" if split else "joint") + (", checkpointing" if checkpointing else "")
                print(
                    f"{name:<24}{kept_bytes[split] / 2**20:>12.1f}{kept_bytes[split] / kept_bytes[False]:>10.2f}"
                    f"{middle[split]:>10.2f}{middle[split] / middle[False]:>10.2f}"
                )


def prepared(folder: Path, checkpointing: bool) -> tuple[Session, list[Draw], list[tuple[int, int]]]:
    """A session on the demo model with one batch of `PAIRS` pairs."""
    name = f"checkpointing-{checkpointing}"
    records = []
    for i, scene in enumerate(itertools.islice(scenes(7, held_out=False), PAIRS)):
        record = {"prompt": scene.caption}
        for side, style in (("chosen", "neon"), ("rejected", "plain")):
            path = folder / f"{side}-{i}.png"
            render(scene, style, 64).save(path)
            record[side] = str(path)
        records.append(json.dumps(record) + "\n")
    values = {
        "name": name,
        "model": {"path": "demo"},
        "data": {"pairs": "pairs.jsonl", "held_out": 0.0},
        "optimizer": {"type": "adamw"},
        "training": {
            "train_batch_size": PAIRS,
            "gradient_accumulation_steps": 1,
            "device": "cpu",
            "gradient_checkpointing": checkpointing,
        },
    }
    session = prepare(create_run(name, build_config(values).to_json(), "".join(records)), None, None)
    session.step = 1
    buckets = [e.bucket for e in session.pairs.entries]
    return session, [Draw(0, i) for i in range(PAIRS)], buckets


if __name__ == "__main__":
    main()
