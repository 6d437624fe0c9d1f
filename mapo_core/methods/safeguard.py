"""Diffusion-SDPO's safeguard, Fu et al., arXiv 2511.03317: the rejected image must not undo the chosen one's step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED_MU = {"sdxl": 0.6, "sd15": 0.9, "demo": 0.9}


def published_mu(wanted: bool, mu: float | None, family: str) -> float | None:
    """mu of the settings, or the one published for the family; None where the safeguard is not wanted."""
    if not wanted:
        return None
    return PUBLISHED_MU[family] if mu is None else mu


def safeguard_factor(
    chosen_gradient: Tensor, rejected_gradient: Tensor, chosen_pull: Tensor, rejected_pull: Tensor, mu: float
) -> Tensor:
    """By how much each pair's rejected gradient is to be scaled, [B] in 0-1.

    A small step against the gradients moves the predictions by -(a_w g_w - lambda a_l g_l) times its size, and K_w by
    g_w times that. It stays below -mu a_w |g_w|^2, a share mu of what the chosen image alone would bring, with

        lambda = clip((1 - mu) a_w <g_w, g_w> / (a_l <g_w, g_l>), 0, 1)   where <g_w, g_l> > 0, else 1.

    The authors write it with a_w = a_l, which holds for Diffusion-DPO; MaPO's differ.

    Args:
        chosen_gradient: g_w, dK_w / d prediction of the chosen image, [B, ...] (a multiple of the residual).
        rejected_gradient: g_l, likewise.
        chosen_pull: dL/dK_w, [B]; a_w is its size.
        rejected_pull: dL/dK_l, [B]; a_l is its size.
        mu: 0-1.
    """
    import torch

    dims = tuple(range(1, chosen_gradient.ndim))
    own = (chosen_gradient * chosen_gradient).sum(dims)
    shared = (chosen_gradient * rejected_gradient).sum(dims)
    # Where the pulls have other signs (label smoothing, past its optimum) the rejected image is not pushed away.
    applies = (shared > 0) & (chosen_pull > 0) & (rejected_pull < 0)
    bound = (1 - mu) * chosen_pull.abs() * own / torch.where(applies, rejected_pull.abs() * shared, 1.0)
    return torch.where(applies, bound.clamp(0.0, 1.0), 1.0)
