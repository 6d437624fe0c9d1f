"""How much memory there is and how much is used: of the CUDA device, or of the process where there is none."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
from pathlib import Path
from typing import Self

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """The largest memory use inside a `with` block, bytes.

    On CUDA what the allocator took of the device, fragments included, on this process' device; elsewhere the largest
    resident size of the process. Where the system cannot start that figure anew (only Linux can), it is the largest
    since the process began.

    Attributes:
        reserved_bytes: the figure above.
        allocated_bytes: on CUDA what tensors took of it at most; elsewhere the same.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reserved_bytes = self.allocated_bytes = 0

    def __enter__(self) -> Self:
        """Begin."""
        free_cached(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):  # not Linux, or a sandbox that forbids it
                _CLEAR.write_text("5")
        return self

    def __exit__(self, *_: object) -> None:
        """Read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.reserved_bytes = torch.cuda.max_memory_reserved(self.device)
            self.allocated_bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.reserved_bytes = self.allocated_bytes = peak_process_bytes()


def free_cached(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_process_bytes() -> int:
    """The largest resident size of this process, since `PeakMemory` began to look where the system allows it."""
    try:
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def available_bytes(device: torch.device) -> int:
    """What this process has of the device's memory and could still get; processes of one run share what is free."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    import psutil

    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return psutil.virtual_memory().available // beside + psutil.Process().memory_info().rss


def used_bytes(device: torch.device) -> int:
    """What this process holds now: tensors on CUDA, elsewhere all of the process that is resident."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def used_share(device: torch.device) -> float:
    """How much of the device's memory is taken, by anyone, 0-1; 0 where there is no CUDA device."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


def tensor_share(device: torch.device) -> float:
    """As `used_share`, without what torch keeps for later tensors: that can be had at once."""
    if device.type != "cuda":
        return 0.0
    _, total = torch.cuda.mem_get_info(device)
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return used_share(device) - idle / total


def machine_name(device: torch.device) -> str:
    """What a measurement holds for: the GPU and its size, or the processor's kind and the computer's memory."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    import psutil

    return f"{device.type}, {platform.machine()}, {psutil.virtual_memory().total / 2**30:.0f} GiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up: torch's own, and what it raises on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("not enough memory" in text or "can't allocate memory" in text)
