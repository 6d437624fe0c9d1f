"""Several processes that train one run: starting them on this machine, and agreeing.

The processes find each other by the environment that `accelerate launch` and torchrun give them; gradients are averaged
by accelerate. Nothing here is needed with one process.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .runs import EventWriter, acquire_run_lock, reader_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .runs import RunDir

MAIN = Path(__file__).resolve().parent / "__main__.py"

WAIT = timedelta(hours=12)
"""How long a process waits for another one: while the main one encodes, measures, draws or is paused, the others do."""


def launch(run: RunDir, processes: int, lifetime: str) -> int:
    """Start the processes of a run and wait for them; when one fails, the others are ended.

    The standard input of this process, whose end means that the parent is gone, is handed on.

    Args:
        run: the run.
        processes: how many.
        lifetime: "tied" or "detached", for the main one.

    Returns:
        0 if all ended well. A failure that no process could write down itself becomes a `run_failed` event.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(MAIN), "train", str(run.path.absolute()), "--lifetime", lifetime]
    done = subprocess.run(command, check=False)
    if done.returncode == 0:
        return 0
    with acquire_run_lock(run, wait_s=10.0):
        if reader_of(run).status().state not in ("failed", "stopped", "finished"):
            with EventWriter(run) as events:
                events.emit(
                    "run_failed",
                    message=f"One of the {processes} training processes failed, so the others were ended. "
                    f"{run.log} says why; `mapo resume {run.name}` goes on from the last checkpoint.",
                    error="ProcessFailed",
                )
    return 1


def is_lost_process(error: BaseException) -> bool:
    """Whether this is what torch says when another process has ended in the middle of something common."""
    import torch

    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in lost)
    )


def largest(accelerator: Accelerator, number: int) -> int:
    """The largest of the processes' numbers; all must ask at the same place."""
    if accelerator.num_processes == 1:
        return number
    import torch

    every: Any = accelerator.gather(torch.tensor([number], device=accelerator.device))
    return int(every.max().item())


def agree(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process wishes it; all must ask at the same place."""
    if accelerator.num_processes == 1:
        return wish
    import torch

    total: Any = accelerator.reduce(torch.tensor(float(wish), device=accelerator.device), reduction="sum")
    return bool(total.item() > 0)
