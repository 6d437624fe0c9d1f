"""Margin-aware Preference Optimization, Hong et al., arXiv 2406.06424: alignment without a reference model.

Both published forms are one family; K is the per-sample squared error, phi(x) = x / (exp(x) - 1):

    L = K_w - weight * logsigmoid( gain * [ phi(scale * K_w)^power - phi(scale * K_l)^power ] )

"paper" is equations 9-11 of the second version: power beta, weight 1/beta, scale and gain 1.
"official" is the authors' released code: weight `beta_mapo`, scale `snr_value`, gain `num_train_timesteps`, power 1.
They are not equivalent; docs/papers.md shows how differently they pull on the rejected image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from .._settings import Settings
from .safeguard import published_mu
from .smoothing import smooth_logsigmoid

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Inversion

_FIELDS = {"paper": ("beta",), "official": ("margin_weight", "link_scale", "logit_scale")}


class MaPOConfig(Settings):
    """Settings of MaPO. `beta` belongs to the paper's form, the other three to the authors' code."""

    type: Literal["mapo"] = "mapo"
    parametrisation: Literal["paper", "official"] | None = None
    """Which published form: "paper" (equations 9-11) or "official" (the authors' code). Default: the one whose settings
    are given, else the paper's, which was the better one in docs/benchmarks/reference_mismatch.md."""
    beta: float | None = Field(default=None, gt=0, le=1e5)
    """Paper form: exponent of the link and inverse weight of the margin; a large value approaches SFT. Published
    values: 8 general preference, 32 culture, 64 safety and style, 1024 personalisation (Table 4). Default 64."""
    margin_weight: float | None = Field(default=None, ge=0, le=100)
    """Official form: weight of the margin term beside the chosen image's error (`beta_mapo`); 0 is SFT. Default 0.1,
    the authors'; 0.02 for the demo model."""
    link_scale: float | None = Field(default=None, gt=0, le=1e4)
    """Official form: factor on the error inside the link (`snr_value`). Default 0.5, the authors'."""
    logit_scale: float | None = Field(default=None, gt=0, le=1e6)
    """Official form: factor on the score difference (`num_train_timesteps`). Default 1000, the authors'."""
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

    @model_validator(mode="before")
    @classmethod
    def _form_of_the_fields(cls, values: Any) -> Any:
        """Settings of the authors' code alone mean that form; what is meant is kept, whatever later defaults are."""
        if not isinstance(values, dict) or values.get("parametrisation") is not None:
            return values
        given = {form: any(values.get(name) is not None for name in names) for form, names in _FIELDS.items()}
        meant = "official" if given["official"] and not given["paper"] else "paper"
        return {**values, "parametrisation": meant}

    @model_validator(mode="after")
    def _only_fields_of_this_form(self) -> Self:
        meant = self.parametrisation or "paper"
        other = "official" if meant == "paper" else "paper"
        wrong = [name for name in _FIELDS[other] if getattr(self, name) is not None]
        if wrong:
            right = ", ".join(_FIELDS[meant])
            raise ValueError(
                f"{', '.join(wrong)} belongs to parametrisation '{other}'; '{meant}' takes {right}. "
                f"Remove it, or set method.parametrisation to '{other}'."
            )
        return self

    def build(self, family: str) -> MaPOLoss:
        """The loss with these settings."""
        mu = published_mu(self.safeguard, self.safeguard_mu, family)
        if self.parametrisation == "paper":
            return MaPOLoss(
                "paper",
                beta=64.0 if self.beta is None else self.beta,
                safeguard_mu=mu,
                label_smoothing=self.label_smoothing,
            )
        default_weight = 0.02 if family == "demo" else 0.1
        return MaPOLoss(
            "official",
            margin_weight=default_weight if self.margin_weight is None else self.margin_weight,
            link_scale=0.5 if self.link_scale is None else self.link_scale,
            logit_scale=1000.0 if self.logit_scale is None else self.logit_scale,
            safeguard_mu=mu,
            label_smoothing=self.label_smoothing,
        )


class MaPOLoss:
    """The loss of one of the two published forms.

    Args:
        parametrisation: "paper" takes `beta`; "official" takes the other three.
        beta: exponent of the link, and inverse weight of the margin.
        margin_weight: weight of the margin term.
        link_scale: factor on the errors inside the link.
        logit_scale: factor on the difference of the scores.
        safeguard_mu: for the trainer, as `Loss` explains it.
        label_smoothing: probability that a vote is wrong, in the margin term.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"chosen_mse", "rejected_mse"})
    inversion: Inversion | None = None

    def __init__(
        self,
        parametrisation: Literal["paper", "official"],
        *,
        beta: float = 64.0,
        margin_weight: float = 0.1,
        link_scale: float = 0.5,
        logit_scale: float = 1000.0,
        safeguard_mu: float | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        self.safeguard_mu = safeguard_mu
        self.smoothing = label_smoothing
        if parametrisation == "paper":
            self.scale, self.power, self.gain, self.weight = 1.0, beta, 1.0, 1.0 / beta
        else:
            self.scale, self.power, self.gain, self.weight = link_scale, 1.0, logit_scale, margin_weight

    def score(self, mse: Tensor) -> Tensor:
        """The implicit reward of an image, phi(scale * K)^power in (0, 1], [B]."""
        return (self.power * log_phi(self.scale * mse)).exp()

    def __call__(
        self, chosen_mse: Tensor, rejected_mse: Tensor, sft_weight: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per pair and metrics, each [B], from float32 errors [B] and the weights [B] of the first term."""
        chosen_score, rejected_score = self.score(chosen_mse), self.score(rejected_mse)
        logit = self.gain * (chosen_score - rejected_score)
        first = chosen_mse if sft_weight is None else sft_weight * chosen_mse
        loss = first - self.weight * smooth_logsigmoid(logit, self.smoothing)
        metrics = {
            "rewards/chosen": chosen_score.detach(),
            "rewards/rejected": rejected_score.detach(),
            "rewards/margins": logit.detach(),
            "rewards/accuracies": (logit > 0).float(),
        }
        return loss, metrics


def log_phi(x: Tensor) -> Tensor:
    """log(x / (exp(x) - 1)) for x >= 0, exact in float32 from 0 to beyond 88.7, gradients included.

    Below 1e-2 its series; the two branches are joined with a double `where`, so that neither sends NaN through the
    other's gradient.
    """
    import torch

    small = x < 1e-2
    safe = torch.where(small, torch.ones_like(x), x)
    large_form = safe.log() - safe - (-torch.expm1(-safe)).log()
    tiny = torch.where(small, x, torch.zeros_like(x))
    series = tiny * (-0.5 + tiny * (-1 / 24 + tiny * tiny / 2880))
    return torch.where(small, series, large_form)
