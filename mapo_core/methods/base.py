"""What the trainer asks of a method. A new method is one file beside this one and one line in METHODS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Loss(Protocol):
    """A loss per pair, out of numbers alone: no model, no files, no averaging.

    `needs` names the keyword arguments of `__call__`, each a float32 tensor [B] of per-sample squared errors (mean
    over channels, height and width):

    - `chosen_mse`, `rejected_mse`: of the network with the adapter, same noise and timestep for both images;
    - `chosen_mse_ref`, `rejected_mse_ref`: of the reference network (adapter off), without gradient.

    The trainer computes exactly what is named here.
    """

    needs: ClassVar[frozenset[str]]

    def __call__(self, *args: Any, **errors: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss per pair [B], float32, and metrics per pair [B], detached."""
        ...


class MethodConfig(Protocol):
    """The settings of a method, as they stand in TrainConfig.method; a pydantic model with a `type`."""

    type: str

    def build(self, family: str) -> Loss:
        """The loss with these settings; what is left open takes the value published for the family."""
        ...
