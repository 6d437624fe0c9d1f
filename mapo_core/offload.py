"""Blocks of frozen weights that wait in the computer's memory and come to the device when they are used.

diffusers' group offloading puts a module's weights away after its forward pass by replacing their storage, and the
backward pass then finds them on the wrong device. Here a layer asks for its weights whenever it computes, forward and
backward (`frozen.StoredLinear`), and autograd never holds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .frozen import StoredWeight


class BlockSwap:
    """Keeps at most `resident` blocks on the device: the one in use and, if there is room, the next one.

    The order is learned in the first forward pass; after that the next block, or in a backward pass the one before,
    is copied in a stream of its own while the one in use computes.
    """

    def __init__(self, device: torch.device, resident: int = 2) -> None:
        self.device = device
        self.limit = resident
        self.order: list[Block] = []
        self.resident: list[Block] = []
        self.most_resident = 0
        self.copies = 0
        self._last: Block | None = None
        self._step = 1  # to the next block in the present direction
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def use(self, block: Block) -> list[StoredWeight]:
        """The weights of a block on the device."""
        if block.position is None:
            block.position = len(self.order)
            self.order.append(block)
        moved_on = block is not self._last
        if moved_on and self._last is not None and self._last.position is not None:
            self._step = 1 if block.position > self._last.position else -1
        if block.position == 0:
            self._step = 1  # the next pass begins
        self._last = block
        if block.here is None:
            self._evict(keep=(block,), room=1)
            self._copy(block)
        if moved_on:
            self._prefetch(block)
        assert block.here is not None
        if self._stream is not None and block.ready is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(block.ready)
            for weight in block.here:
                for tensor in weight.tensors:
                    tensor.record_stream(stream)
            block.ready = None
        return block.here

    def _prefetch(self, block: Block) -> None:
        assert block.position is not None
        following = block.position + self._step
        if self.limit < 2 or not 0 <= following < len(self.order):
            return
        upcoming = self.order[following]
        if upcoming.here is None:
            self._evict(keep=(block, upcoming), room=1)
            self._copy(upcoming)

    def _evict(self, keep: tuple[Block, ...], room: int) -> None:
        for old in [b for b in self.resident if b not in keep]:
            if len(self.resident) + room <= self.limit:
                return
            old.here = old.ready = None
            self.resident.remove(old)

    def _copy(self, block: Block) -> None:
        if self._stream is None:
            block.here = [w.moved(tuple(self._there(t) for t in w.tensors)) for w in block.host]
        else:
            with torch.cuda.stream(self._stream):
                block.here = [w.moved(tuple(self._there(t) for t in w.tensors)) for w in block.host]
                block.ready = self._stream.record_event()
        self.resident.append(block)
        self.copies += 1
        self.most_resident = max(self.most_resident, len(self.resident))

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.clone() if tensor.device == self.device else tensor.to(self.device, non_blocking=True)


class Block:
    """Weights that come and go together."""

    def __init__(self, swap: BlockSwap) -> None:
        self.swap = swap
        self.host: list[StoredWeight] = []
        self.here: list[StoredWeight] | None = None
        self.ready: Any = None
        self.position: int | None = None

    def add(self, stored: StoredWeight) -> int:
        """Take a weight in, in pinned memory where there is a GPU; its place."""
        tensors = tuple(t.cpu() for t in stored.tensors)
        if self.swap.device.type == "cuda":
            tensors = tuple(t.pin_memory() for t in tensors)
        self.host.append(stored.moved(tensors))
        return len(self.host) - 1

    def weights(self) -> list[StoredWeight]:
        """On the device."""
        return self.swap.use(self)
