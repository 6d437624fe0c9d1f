"""DINOv2: similarity of images, and a score of how near pictures are to the chosen images.

Oquab et al.: *DINOv2: Learning Robust Visual Features without Supervision*, 2023, arXiv 2304.07193. The embedding is
the class token after the last layer norm, L2-normalised, of a 224-pixel crop, as in the authors' transform.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from ..errors import ConfigError
from ..families._quiet import quiet_import_notices
from .vision import IMAGENET_MEAN, IMAGENET_STD, pixel_values
from .weights import WeightSource, find_weights, load_pretrained

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from .scorers import ScorerOptions

SOURCE = WeightSource("dinov2", "facebook/dinov2-base", ("config.json", "*.safetensors"), "350 MB")
SOURCES = (SOURCE,)
_SIDE, _RESIZE = 224, 256  # pixels
_BATCH = 16


class DINOv2:
    """The embedder."""

    name = "dinov2"
    title = "DINOv2 class token"

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """[N, D] float32 on the CPU, L2-normalised."""
        parts: list[Tensor] = []
        for start in range(0, len(images), _BATCH):
            x = pixel_values(images[start : start + _BATCH], _SIDE, IMAGENET_MEAN, IMAGENET_STD, resize=_RESIZE)
            hidden = self._model(pixel_values=x.to(self._device)).last_hidden_state  # [B, 1 + patches, D]
            parts.append(normalize(hidden[:, 0].float(), dim=1).cpu())
        return torch.cat(parts)


def load_dinov2(folder: Path | None = None, *, device: str = "auto", download: bool = False) -> DINOv2:
    """Load DINOv2 from a folder, `MAPO_HOME/models/dinov2` or the Hub cache.

    Raises:
        MissingWeightsError: it is not there.
    """
    from ..devices import preferred_device

    quiet_import_notices()
    path = find_weights(SOURCE, folder, download)
    from transformers import Dinov2Model

    where = preferred_device(device)
    return DINOv2(load_pretrained(Dinov2Model, path, where), where)


class DINOv2Similarity:
    """Mean cosine similarity to the chosen images, as Ruiz et al. (DreamBooth, 2023) measure subject fidelity."""

    name = "dinov2"
    title = "DINOv2 similarity to chosen images"

    def __init__(self, embedder: DINOv2, references: Sequence[Image.Image]) -> None:
        self._embedder = embedder
        self._references = embedder.embed(references)  # [R, D]

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], -1 to 1."""
        return (self._embedder.embed(images) @ self._references.T).mean(dim=1).tolist()


def load(name: str, options: ScorerOptions) -> DINOv2Similarity:
    """The scorer.

    Raises:
        ConfigError: there are no chosen images to compare with.
        MissingWeightsError: the weights are not here.
    """
    if not options.references:
        raise ConfigError("Scorer dinov2 needs chosen images to compare with.")
    embedder = load_dinov2(options.folders.get("dinov2"), device=options.device, download=options.download)
    return DINOv2Similarity(embedder, options.references)
