"""What the trainer asks of a model family. One file per family implements it; `FAMILIES` lists them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from torch import Tensor, nn

    from ..sections import ModelConfig


@dataclass
class DiffusionModel:
    """A loaded base model, its parts frozen and in evaluation mode.

    Attributes:
        family: name in `FAMILIES`.
        unet: the denoiser; the LoRA goes here.
        vae, text_encoders: None or empty once `release_encoders` has run or when they were not asked for.
        noise_scheduler: DDPMScheduler with the model's betas, `prediction_type` and zero-terminal-SNR rescaling.
        fingerprint: hash that changes when the weights of VAE or text encoders change; part of the cache key.
        resolution: side of a native square picture, pixels.
        latent_scale: pixels per latent, 8 for the published models.
        source: the path or id as the user gave it.
        extras: what one family alone needs (for example `clip_skip`).
    """

    family: str
    unet: nn.Module
    vae: nn.Module | None
    text_encoders: list[nn.Module]
    tokenizers: list[Any]
    noise_scheduler: Any
    sampling_scheduler: Any
    prediction_type: str
    fingerprint: str
    resolution: int
    latent_scale: int
    source: str
    extras: dict[str, Any] = field(default_factory=dict)
    trains_text: bool = False  # the text encoders are trained; prompts are encoded anew for every forward pass
    new_tokens: tuple[str, ...] = ()  # as in the settings, once the text encoders have them

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.unet.parameters()).device

    def encoders_to(self, device: torch.device | str) -> None:
        """Move VAE and text encoders, for example off the GPU once everything is encoded."""
        for part in (self.vae, *self.text_encoders):
            if part is not None:
                part.to(device)

    def release_encoders(self) -> None:
        """Drop VAE and text encoders, so that their memory can be freed."""
        self.vae = None
        self.text_encoders = []


@dataclass(frozen=True)
class ImageGeometry:
    """Sizes that SDXL is told about an image; (height, width) as in the paper's micro-conditioning, pixels."""

    original_size: tuple[int, int]
    crop_top_left: tuple[int, int]
    target_size: tuple[int, int]


class Family(Protocol):
    """A model family: how to load, encode, predict, sample and name LoRA keys."""

    name: str
    title: str  # "Stable Diffusion XL"
    architecture: str  # modelspec.architecture without "/lora"
    base_model_version: str  # ss_base_model_version
    resolution: int  # of the published models, pixels

    def load(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        encoders: bool = True,
    ) -> DiffusionModel:
        """Load from a single file, a diffusers folder or a Hub id; unet and text encoders in `dtype`, VAE in float32.

        Raises:
            ModelError: the source is missing, incomplete or of another family.
        """
        ...

    def encode_prompts(self, model: DiffusionModel, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per prompt, float32 on the CPU: `prompt_embeds` [T, C] and what else the family conditions on, unbatched.

        Prompts longer than the tokenizer's window are encoded in chunks, so T is a multiple of the window.
        """
        ...

    def encode_prompts_live(self, model: DiffusionModel, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """As `encode_prompts`, on the text encoders' device and with gradient where it is enabled."""
        ...

    def encode_images(self, model: DiffusionModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [-1, 1] -> mean and standard deviation of the scaled latents, [B, 4, h, w] each, float32."""
        ...

    def batch_conditions(
        self, prompts: Sequence[dict[str, Tensor]], geometry: Sequence[ImageGeometry]
    ) -> dict[str, Tensor]:
        """Stack the conditions of B samples, float32 on the CPU; shorter prompt_embeds are lengthened as the
        family's sampler would do it. Keys are those that `predict` takes.
        """
        ...

    def predict(
        self, model: DiffusionModel, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The denoiser's output [B, 4, h, w] for noisy latents [B, 4, h, w] and timesteps [B] (int64)."""
        ...

    def pipeline(self, model: DiffusionModel) -> Any:
        """A diffusers pipeline over the same modules, for sampling; nothing is copied."""
        ...

    def target_modules(self, groups: Sequence[str]) -> list[str]:
        """peft `target_modules` for groups among "attention", "feed_forward", "conv"."""
        ...

    def kohya_prefix(self, module: str) -> str:
        """The kohya name of a layer, for example `lora_unet_down_blocks_1_attentions_0_proj_in`.

        A text encoder's layer is given by its full name (`components.full_name`).
        """
        ...


@dataclass(frozen=True)
class Detected:
    """What a model file or folder turned out to be."""

    family: str
    kind: str  # "single_file", "diffusers", "hub"
    path: Path | None
    prediction_type: str | None = None  # None: the file does not say
    zero_terminal_snr: bool | None = None
