"""What the trainer asks of a method. A new method is one file beside this one and one line in METHODS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Inversion:
    """How a method has x_t made from x_0 where it does not want Gaussian noise: by inverting the sampler.

    Attributes:
        steps: levels of noise between x_0 and the last timestep; a pair's timestep is one of them.
        eta: fresh noise after every step, as a share of DDIM's standard deviation between its two levels.
        renoise: go every step twice, the second time with the mean of the predictions at both of its ends.
    """

    steps: int
    eta: float = 0.0
    renoise: bool = False


class Loss(Protocol):
    """A loss per pair, out of numbers alone: no model, no files, no averaging.

    `needs` names the keyword arguments of `__call__`, each a float32 tensor [B]. Squared errors are per sample, the
    mean over channels, height and width:

    - `chosen_mse`, `rejected_mse`: of the network with the adapter, same noise and timestep for both images;
    - `chosen_mse_ref`, `rejected_mse_ref`: of the reference network (adapter off), without gradient;
    - `chosen_mse_base`: of the reference network on the pair's `base_prompt`, where it has one;
    - `class_mse`: of the network with the adapter on a class image, with its own prompt, noise and timestep;
    - `chosen_score`, `rejected_score`: the pair's preference scores, min-max normalised over the pair set to 0-1.

    The trainer computes exactly what is named here. Methods with the plain denoising error in their loss also take its
    weights by noise level, [B] each or not at all: `sft_weight` of the chosen image, and with `class_mse` its own
    `class_weight`.
    """

    needs: ClassVar[frozenset[str]]

    @property
    def inversion(self) -> Inversion | None:
        """How x_t is made by inversion; None: by adding Gaussian noise."""
        ...

    @property
    def safeguard_mu(self) -> float | None:
        """mu of `safeguard_factor`, by which the rejected gradient is then scaled; None: it is not."""
        ...

    def __call__(self, *args: Any, **errors: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss per pair [B], float32, and metrics per pair [B], detached."""
        ...


class MethodConfig(Protocol):
    """The settings of a method, as they stand in TrainConfig.method; a pydantic model with a `type`."""

    type: str

    def build(self, family: str) -> Loss:
        """The loss with these settings; what is left open takes the value published for the family."""
        ...
