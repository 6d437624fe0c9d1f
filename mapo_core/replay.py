"""Run a piece of work a second time with the same random numbers."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The generators of the CPU and of one device, as they were."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        """As they are now."""
        own = None
        if device.type == "cuda":
            own = torch.cuda.get_rng_state(device)
        elif device.type == "mps":
            own = torch.mps.get_rng_state()
        return cls(device, torch.get_rng_state(), own)

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.cpu)
        if self.own is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.own, self.device)
        elif self.own is not None:
            torch.mps.set_rng_state(self.own)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, the numbers drawn after this state come again; afterwards the generators go on as if nothing was."""
        now = RandomState.of(self.device)
        self.restore()
        try:
            yield
        finally:
            now.restore()
