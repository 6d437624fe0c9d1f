"""Stable Diffusion 1.5: one text encoder (Rombach et al. 2022)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _blueprint, _lora

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from ..sections import ModelConfig
    from .base import DiffusionModel, ImageGeometry


class SD15:
    """The family of Stable Diffusion 1.4 and 1.5 and their descendants; see `base.Family` for what the methods do."""

    name = _blueprint.SD15.name
    title = _blueprint.SD15.title
    architecture = "stable-diffusion-v1"
    base_model_version = "sd_v1"
    resolution = _blueprint.SD15.resolution

    def __init__(self, blueprint: _blueprint.Blueprint = _blueprint.SD15) -> None:
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
        """Per prompt `prompt_embeds` [T, 768], float32 on the CPU."""
        from ._clip import encode_sd15

        return encode_sd15(model, prompts)

    def encode_prompts_live(self, model: DiffusionModel, prompts: Sequence[str]) -> list[dict[str, Tensor]]:
        """The same on the text encoders' device, with gradient where it is enabled."""
        from ._clip import encode_sd15

        return encode_sd15(model, prompts, live=True)

    def encode_images(self, model: DiffusionModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the scaled latents, on the VAE's device."""
        from ._vae import encode_images

        return encode_images(model, pixels)

    def batch_conditions(
        self, prompts: Sequence[dict[str, Tensor]], geometry: Sequence[ImageGeometry]
    ) -> dict[str, Tensor]:
        """`prompt_embeds` [B, T, 768]; the sizes are not used."""
        from ._denoiser import conditions_sd15

        return conditions_sd15(prompts)

    def predict(
        self, model: DiffusionModel, noisy_latents: Tensor, timesteps: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """The UNet's output in float32."""
        from ._denoiser import predict

        return predict(model, noisy_latents, timesteps, conditions)

    def pipeline(self, model: DiffusionModel) -> Any:
        """A StableDiffusionPipeline; ask for `output_type="latent"` unless the UNet is float32 like the VAE."""
        from ._denoiser import pipeline_sd15

        return pipeline_sd15(model)

    def target_modules(self, groups: Sequence[str]) -> list[str]:
        """For peft."""
        return _lora.target_modules(groups)

    def kohya_prefix(self, module: str) -> str:
        """The kohya name of a layer of the UNet or of a text encoder."""
        return _lora.kohya_prefix(module, self.name)
