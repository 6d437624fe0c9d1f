"""Stable Diffusion XL: two text encoders, and the sizes of the image as further conditions (Podell et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _blueprint, _lora

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from ..sections import ModelConfig
    from .base import DiffusionModel, ImageGeometry


class SDXL:
    """The family of Stable Diffusion XL 1.0 and its descendants; see `base.Family` for what the methods do."""

    name = _blueprint.SDXL.name
    title = _blueprint.SDXL.title
    architecture = "stable-diffusion-xl-v1-base"
    base_model_version = "sdxl_base_v1-0"
    resolution = _blueprint.SDXL.resolution

    def __init__(self, blueprint: _blueprint.Blueprint = _blueprint.SDXL) -> None:
        self._blueprint = blueprint

    def load(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        encoders: bool = True,
    ) -> DiffusionModel:
        """Load from a single file, a diffusers folder or a Hub id; raises ModelError."""
        from ._loading import load_model

        return load_model(self._blueprint, config, device=device, dtype=dtype, encoders=encoders)

    def encode_prompts(self, model: DiffusionModel, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Per prompt `prompt_embeds` [T, 2048] and `pooled_prompt_embeds` [1280], float32 on the CPU."""
        from ._clip import encode_sdxl

        return encode_sdxl(model, prompts)

    def encode_prompts_live(self, model: DiffusionModel, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """The same on the text encoders' device, with gradient where it is enabled."""
        from ._clip import encode_sdxl

        return encode_sdxl(model, prompts, live=True)

    def encode_images(self, model: DiffusionModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, on the VAE's device."""
        from ._vae import encode_images

        return encode_images(model, pixels)

    def batch_conditions(
        self, prompts: Sequence[dict[str, Tensor]], geometry: Sequence[ImageGeometry]
    ) -> dict[str, Tensor]:
        """`prompt_embeds` [B, T, 2048], `pooled_prompt_embeds` [B, 1280], `add_time_ids` [B, 6]."""
        from ._denoiser import conditions_sdxl

        return conditions_sdxl(prompts, geometry)

    def predict(
        self, model: DiffusionModel, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The UNet's output in float32."""
        from ._denoiser import predict

        return predict(model, noisy_latents, timesteps, conditions)

    def pipeline(self, model: DiffusionModel) -> Any:
        """A StableDiffusionXLPipeline; ask for `output_type="latent"` unless the UNet is float32 like the VAE."""
        from ._denoiser import pipeline_sdxl

        return pipeline_sdxl(model)

    def target_modules(self, groups: Sequence[str]) -> list[str]:
        """For peft."""
        return _lora.target_modules(groups)

    def kohya_prefix(self, module: str) -> str:
        """The kohya name of a layer of the UNet or of a text encoder."""
        return _lora.kohya_prefix(module, self.name)
