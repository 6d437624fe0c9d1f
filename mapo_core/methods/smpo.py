"""SmPO-Diffusion, Lu et al., arXiv 2506.02698: Diffusion-DPO with smoothed preferences, at renoised points."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .._settings import Settings
from .base import Inversion
from .smoothing import smooth_logsigmoid

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED_INVERSION_STEPS = {"sdxl": 10, "sd15": 5, "demo": 5}


class SmPOConfig(Settings):
    """Settings of SmPO, which needs a chosen_score and a rejected_score for every pair."""

    type: Literal["smpo"] = "smpo"
    beta: float = Field(default=5000.0, gt=0, le=1e6)
    """Strength of the pull to the reference: a larger value keeps the model closer to the base. Default: the
    paper's."""
    gamma: float = Field(default=10.0, gt=0, le=1e4)
    """Factor on the smoothed preference 2p - 1, which is at most 0.46. Default: the paper's."""
    inversion_steps: int | None = Field(default=None, ge=1, le=1000)
    """Noise levels of the inversion, spread over the schedule; a pair is trained at one of them. A step of training
    begins with about this many forward passes. Default 10 for SDXL and 5 for SD 1.5, the authors' code; 5 for the demo
    model."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability with which a vote is taken to be wrong: a larger value stops pushing the two images apart sooner. Use
    0.05 to 0.2 where people disagree or scores decided. 0 is the published form."""

    def build(self, family: str) -> SmPOLoss:
        """The loss with these settings."""
        steps = PUBLISHED_INVERSION_STEPS[family] if self.inversion_steps is None else self.inversion_steps
        return SmPOLoss(beta=self.beta, gamma=self.gamma, inversion_steps=steps, label_smoothing=self.label_smoothing)


class SmPOLoss:
    """-logsigmoid(gamma (2p - 1) u), u as in Diffusion-DPO, p the softmax of the pair's normalised scores.

    A pair whose rejected image has the larger score has a negative 2p - 1: it is trained the other way round.
    """

    needs: ClassVar[frozenset[str]] = frozenset(
        {"chosen_mse", "rejected_mse", "chosen_mse_ref", "rejected_mse_ref", "chosen_score", "rejected_score"}
    )
    safeguard_mu: float | None = None

    def __init__(
        self, beta: float = 5000.0, gamma: float = 10.0, inversion_steps: int = 10, *, label_smoothing: float = 0.0
    ) -> None:
        self.beta = beta
        self.gamma = gamma
        self.smoothing = label_smoothing
        self.inversion = Inversion(steps=inversion_steps, renoise=True)

    def __call__(
        self,
        chosen_mse: Tensor,
        rejected_mse: Tensor,
        chosen_mse_ref: Tensor,
        rejected_mse_ref: Tensor,
        chosen_score: Tensor,
        rejected_score: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per pair and metrics, each [B], from float32 errors [B] and scores [B] in 0-1."""
        chosen_reward = -0.5 * self.beta * (chosen_mse - chosen_mse_ref)
        rejected_reward = -0.5 * self.beta * (rejected_mse - rejected_mse_ref)
        margin = chosen_reward - rejected_reward
        preference = 2 * (chosen_score - rejected_score).sigmoid() - 1  # 2p - 1
        metrics = {
            "rewards/chosen": chosen_reward.detach(),
            "rewards/rejected": rejected_reward.detach(),
            "rewards/margins": margin.detach(),
            "rewards/accuracies": (margin > 0).float(),
        }
        return -smooth_logsigmoid(self.gamma * preference * margin, self.smoothing), metrics
