"""Trains runs one after the other in the processes that torchrun has started, so that a test pays for one start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from mapo_core.runs import EventWriter, RequestWatcher, RunDir
from mapo_core.trainer import train


def main(folders: list[str]) -> None:
    """Train the runs in these folders, as the children do."""
    for folder in folders:
        AcceleratorState._reset_state(reset_partial_state=True)
        run = RunDir(Path(folder))
        if os.environ["RANK"] != "0":
            train(run, None, None)
            continue
        with EventWriter(run) as events, RequestWatcher(run) as watcher:
            events.emit("run_started", 0)
            train(run, events, watcher)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.backends.mkldnn.flags(enabled=False):  # as in conftest.py
        main(sys.argv[1:])
