"""Preferences that are believed with a doubt: a vote is wrong with some probability (cDPO, Mitchell 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def smooth_logsigmoid(logit: Tensor, smoothing: float) -> Tensor:
    """(1 - e) logsigmoid(u) + e logsigmoid(-u), [B]: it is largest at u = log((1 - e) / e) instead of at infinity.

    Args:
        logit: u, how strongly the chosen image is preferred, [B].
        smoothing: e, the probability that a vote is wrong, 0 to 0.5.
    """
    from torch.nn.functional import logsigmoid

    if smoothing == 0:
        return logsigmoid(logit)
    return (1 - smoothing) * logsigmoid(logit) + smoothing * logsigmoid(-logit)
