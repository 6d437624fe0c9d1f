"""A CLIP model of transformers as unit vectors of images and of texts; shared by the scorers that are built on CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from .vision import CLIP_MEAN, CLIP_STD, Fitting, pixel_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

_TOKENIZER = Path(__file__).resolve().parents[1] / "families" / "assets" / "clip_tokenizer"
_BATCH = 16


class CLIP:
    """Args: the model, complete; `fitting` as of `pixel_values`."""

    def __init__(self, model: Any, device: torch.device, fitting: Fitting = "crop") -> None:
        from transformers import CLIPTokenizer

        self.model = model
        self._device = device
        self._fitting: Fitting = fitting
        # All CLIP models have the same vocabulary, and texts are read at their end token, so padding does not matter.
        self._tokenizer: Any = CLIPTokenizer.from_pretrained(_TOKENIZER, model_max_length=77)

    @property
    def logit_scale(self) -> float:
        """The factor on cosines that the model was trained with."""
        return self.model.logit_scale.exp().item()

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """[N, D] float32 on the CPU, L2-normalised."""
        side = self.model.config.vision_config.image_size
        parts: list[Tensor] = []
        for start in range(0, len(images), _BATCH):
            part = images[start : start + _BATCH]
            x = pixel_values(part, side, CLIP_MEAN, CLIP_STD, fitting=self._fitting).to(self._device)
            pooled = self.model.vision_model(pixel_values=x).pooler_output
            parts.append(normalize(self.model.visual_projection(pooled).float(), dim=1).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D] float32 on the CPU, L2-normalised; what exceeds 77 tokens is cut off, as in the published scores."""
        parts: list[Tensor] = []
        for start in range(0, len(texts), _BATCH):
            tokens = self._tokenizer(
                list(texts[start : start + _BATCH]), padding="max_length", truncation=True, return_tensors="pt"
            ).to(self._device)
            pooled = self.model.text_model(input_ids=tokens.input_ids).pooler_output
            parts.append(normalize(self.model.text_projection(pooled).float(), dim=1).cpu())
        return torch.cat(parts)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Of each image with the text at its place, [N]."""
        return (self.images(images) * self.texts(texts)).sum(dim=1)
