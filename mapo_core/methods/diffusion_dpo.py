"""Diffusion-DPO, Wallace et al., arXiv 2311.12908, equation 14 (the released SDXL recipe averages over pixels)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .._settings import Settings
from .safeguard import published_mu
from .smoothing import smooth_logsigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Inversion

PUBLISHED_BETA = {"sdxl": 5000.0, "sd15": 2000.0, "demo": 2000.0}


class DiffusionDPOConfig(Settings):
    """Settings of Diffusion-DPO."""

    type: Literal["diffusion_dpo"] = "diffusion_dpo"
    beta: float | None = Field(default=None, gt=0, le=1e6)
    """Strength of the pull to the reference: a larger value keeps the model closer to the base. Default 5000 for
    SDXL and 2000 for SD 1.5, the paper's; 2000 for the demo model."""
    safeguard: bool = False
    """Scale the rejected image's gradient down where its step would make the chosen image worse (Diffusion-SDPO). Use
    it where the error on chosen images rises while the margin grows. The metric `safeguard/lambda` is the scale: 1 is
    not at all."""
    safeguard_mu: float | None = Field(default=None, ge=0, le=1)
    """Share of the chosen image's own progress that the safeguard keeps: 1 lets the rejected image take none of it, 0
    all. Default 0.6 for SDXL and 0.9 for SD 1.5, the paper's; 0.9 for the demo model."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability with which a vote is taken to be wrong: a larger value stops pushing the two images apart sooner. Use
    0.05 to 0.2 where people disagree or scores decided. 0 is the published form."""

    def build(self, family: str) -> DiffusionDPOLoss:
        """The loss with these settings."""
        mu = published_mu(self.safeguard, self.safeguard_mu, family)
        beta = PUBLISHED_BETA[family] if self.beta is None else self.beta
        return DiffusionDPOLoss(beta, safeguard_mu=mu, label_smoothing=self.label_smoothing)


class DiffusionDPOLoss:
    """-logsigmoid(u), u = -(beta/2) [(K_w - K_w_ref) - (K_l - K_l_ref)]; the reference is the base model."""

    needs: ClassVar[frozenset[str]] = frozenset({"chosen_mse", "rejected_mse", "chosen_mse_ref", "rejected_mse_ref"})
    inversion: Inversion | None = None

    def __init__(
        self, beta: float = 5000.0, *, safeguard_mu: float | None = None, label_smoothing: float = 0.0
    ) -> None:
        self.beta = beta
        self.safeguard_mu = safeguard_mu
        self.smoothing = label_smoothing

    def __call__(
        self, chosen_mse: Tensor, rejected_mse: Tensor, chosen_mse_ref: Tensor, rejected_mse_ref: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per pair and metrics, each [B], from float32 errors [B]."""
        chosen_reward = -0.5 * self.beta * (chosen_mse - chosen_mse_ref)
        rejected_reward = -0.5 * self.beta * (rejected_mse - rejected_mse_ref)
        logit = chosen_reward - rejected_reward
        metrics = {
            "rewards/chosen": chosen_reward.detach(),
            "rewards/rejected": rejected_reward.detach(),
            "rewards/margins": logit.detach(),
            "rewards/accuracies": (logit > 0).float(),
        }
        return -smooth_logsigmoid(logit, self.smoothing), metrics
