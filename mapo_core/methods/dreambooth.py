"""DreamBooth with prior preservation, Ruiz et al., arXiv 2208.12242, equation 2: learn a subject, keep its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from .._settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from .base import Inversion


class DreamBoothConfig(Settings):
    """Settings of DreamBooth. The chosen images show the subject; their prompts name it and its class."""

    type: Literal["dreambooth"] = "dreambooth"
    class_prompt: str
    """Prompt of the class that the subject belongs to, without the subject's own name: "a photo of a dog"."""
    class_images: int = Field(default=100, ge=1, le=100_000)
    """Pictures of the class, drawn by the base model before training and kept for later runs. Default: 100, as in
    diffusers' script."""
    prior_weight: float = Field(default=1.0, ge=0, le=1000)
    """Weight of the class images beside the chosen ones; a larger value keeps more of what the base model knows of
    the class. Default 1, the paper's."""

    @field_validator("class_prompt")
    @classmethod
    def _says_something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError('is empty; name what kind of thing the subject is, for example "a photo of a dog"')
        return value

    def build(self, family: str) -> DreamBoothLoss:
        """The loss with these settings."""
        return DreamBoothLoss(prior_weight=self.prior_weight)


class DreamBoothLoss:
    """K_instance + lambda K_class: the chosen image's error, and that of a class image of its own noise and time."""

    needs: ClassVar[frozenset[str]] = frozenset({"chosen_mse", "class_mse"})
    inversion: Inversion | None = None
    safeguard_mu: float | None = None

    def __init__(self, prior_weight: float = 1.0) -> None:
        self.prior_weight = prior_weight

    def __call__(
        self,
        chosen_mse: Tensor,
        class_mse: Tensor,
        sft_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss per pair [B], from float32 errors [B] and their weights [B]; no metrics beyond them."""
        if sft_weight is not None and class_weight is not None:  # each image has its own noise level
            chosen_mse, class_mse = sft_weight * chosen_mse, class_weight * class_mse
        return chosen_mse + self.prior_weight * class_mse, {}
