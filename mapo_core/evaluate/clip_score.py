"""CLIP score: how well a picture fits its prompt.

Hessel et al.: *CLIPScore: A Reference-free Evaluation Metric for Image Captioning*, 2021, arXiv 2104.08718: a multiple
of max(cosine, 0). Here 100, as most tables print it, instead of their 2.5, and ViT-L/14 instead of their ViT-B/32, so
that the aesthetic predictor's download serves both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..families._quiet import quiet_import_notices
from .weights import WeightSource, find_weights, load_pretrained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from .clip_model import CLIP
    from .scorers import ScorerOptions

CLIP_L = WeightSource(
    "clip-vit-large-patch14", "openai/clip-vit-large-patch14", ("config.json", "*.safetensors"), "1.7 GB"
)
SOURCES = (CLIP_L,)


class CLIPScore:
    """100 x max(cosine, 0)."""

    name = "clip"
    title = "CLIP score (ViT-L/14)"

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], 0-100."""
        return (100 * self._clip.cosines(images, prompts).clamp(min=0)).tolist()


def load(name: str, options: ScorerOptions) -> CLIPScore:
    """The scorer.

    Raises:
        MissingWeightsError: the weights are not here.
    """
    return CLIPScore(load_clip(CLIP_L, options))


def load_clip(source: WeightSource, options: ScorerOptions) -> CLIP:
    """A CLIP model from a transformers folder.

    Raises:
        MissingWeightsError: it is not here.
        ModelError: it is not complete.
    """
    quiet_import_notices()
    path = find_weights(source, options.folders.get(source.name), options.download)
    from transformers import CLIPModel

    from ..devices import preferred_device
    from .clip_model import CLIP

    device = preferred_device(options.device)
    return CLIP(load_pretrained(CLIPModel, path, device), device)
