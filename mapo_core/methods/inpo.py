"""DDIM-InPO, Lu et al., arXiv 2503.18454: Diffusion-DPO at points that the network itself leads the images to."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .._settings import Settings
from .base import Inversion
from .diffusion_dpo import DiffusionDPOLoss

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED_BETA = {"sdxl": 5000.0, "sd15": 2000.0, "demo": 2000.0}


class InPOConfig(Settings):
    """Settings of InPO."""

    type: Literal["inpo"] = "inpo"
    beta: float | None = Field(default=None, gt=0, le=1e6)
    """Strength of the pull to the reference: a larger value keeps the model closer to the base. Default 5000 for
    SDXL and 2000 for SD 1.5, the paper's; 2000 for the demo model."""
    inversion_steps: int = Field(default=10, ge=1, le=1000)
    """Noise levels of the inversion, spread over the schedule; a pair is trained at one of them. More are closer to
    the exact inversion and slower: a step of training begins with about half as many forward passes. Default: the
    authors' code."""
    eta: float = Field(default=0.1, ge=0, le=1)
    """Fresh noise in every step of the inversion, as a share of DDIM's standard deviation. Default: the authors'
    code."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Probability with which a vote is taken to be wrong: a larger value stops pushing the two images apart sooner. Use
    0.05 to 0.2 where people disagree or scores decided. 0 is the published form."""

    def build(self, family: str) -> InPOLoss:
        """The loss with these settings."""
        beta = PUBLISHED_BETA[family] if self.beta is None else self.beta
        return InPOLoss(
            beta=beta, inversion_steps=self.inversion_steps, eta=self.eta, label_smoothing=self.label_smoothing
        )


class InPOLoss:
    """-logsigmoid(u) with Diffusion-DPO's u, where x_t comes from DDIM inversion and its noise is computed back."""

    needs: ClassVar[frozenset[str]] = DiffusionDPOLoss.needs
    safeguard_mu: float | None = None

    def __init__(
        self, beta: float = 5000.0, inversion_steps: int = 10, eta: float = 0.1, *, label_smoothing: float = 0.0
    ) -> None:
        self.inversion = Inversion(steps=inversion_steps, eta=eta)
        self._dpo = DiffusionDPOLoss(beta, label_smoothing=label_smoothing)

    def __call__(
        self, chosen_mse: Tensor, rejected_mse: Tensor, chosen_mse_ref: Tensor, rejected_mse_ref: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per pair and metrics, each [B], from float32 errors [B]."""
        return self._dpo(chosen_mse, rejected_mse, chosen_mse_ref, rejected_mse_ref)
