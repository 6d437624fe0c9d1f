"""What is trained: named groups of parameters, each with its own learning rate if it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        name: what they belong to, such as "unet"; for messages.
        parameters: by name, in an order that never changes: the optimizer's state is kept by place.
        learning_rate: its own, or None for optimizer.learning_rate.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float | None = None


def flat(groups: Iterable[ParameterGroup]) -> list[nn.Parameter]:
    """All parameters, group after group."""
    return [parameter for group in groups for parameter in group.parameters.values()]
