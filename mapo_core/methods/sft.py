"""Supervised fine-tuning on the chosen images: the ordinary denoising loss, the baseline of every comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from .._settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Inversion


class SFTConfig(Settings):
    """SFT has no settings of its own."""

    type: Literal["sft"] = "sft"

    def build(self, family: str) -> SFTLoss:
        """The loss."""
        return SFTLoss()


class SFTLoss:
    """K_w: the chosen image's squared error."""

    needs: ClassVar[frozenset[str]] = frozenset({"chosen_mse"})
    inversion: Inversion | None = None
    safeguard_mu: float | None = None

    def __call__(self, chosen_mse: Tensor, sft_weight: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per pair [B], with weights [B] if there are some; no metrics beyond it."""
        return chosen_mse if sft_weight is None else sft_weight * chosen_mse, {}
