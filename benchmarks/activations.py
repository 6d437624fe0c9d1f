"""What a forward pass keeps for its backward pass, counted tensor by tensor; works the same on the CPU and on a GPU."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from torch import Tensor


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
