"""Direct Consistency Optimization, Lee et al., arXiv 2402.12004: fine-tuning on the chosen images, held to the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .._settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Inversion


class DCOConfig(Settings):
    """Settings of Direct Consistency Optimization."""

    type: Literal["dco"] = "dco"
    beta: float = Field(default=1000.0, gt=0, le=1e6)
    """How soon an image stops counting once the LoRA predicts it better than the base: a larger value keeps the model
    closer to the base. Default: the authors' code, for SDXL; none is published for SD 1.5."""

    def build(self, family: str) -> DCOLoss:
        """The loss with these settings."""
        return DCOLoss(beta=self.beta)


class DCOLoss:
    """-logsigmoid(-beta (K_w - K_w_base)); K_w_base is the base model's error on the pair's base prompt.

    The rejected image is not used.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"chosen_mse", "chosen_mse_base"})
    inversion: Inversion | None = None
    safeguard_mu: float | None = None

    def __init__(self, beta: float = 1000.0) -> None:
        self.beta = beta

    def __call__(self, chosen_mse: Tensor, chosen_mse_base: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per pair and metrics, each [B], from float32 errors [B]."""
        from torch.nn.functional import logsigmoid

        reward = -self.beta * (chosen_mse - chosen_mse_base)
        return -logsigmoid(reward), {"rewards/chosen": reward.detach()}
