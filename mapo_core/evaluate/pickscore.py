"""PickScore: which picture people would pick for a prompt.

Kirstain et al.: *Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation*, 2023, arXiv 2305.01569.
A CLIP ViT-H/14 trained on their choices; the score is the cosine times the trained scale, as in the authors' code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .clip_score import load_clip
from .weights import WeightSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from .clip_model import CLIP
    from .scorers import ScorerOptions

SOURCES = (WeightSource("pickscore", "yuvalkirstain/PickScore_v1", ("config.json", "*.safetensors"), "4 GB"),)


class PickScore:
    """Scale x cosine."""

    name = "pickscore"
    title = "PickScore"

    def __init__(self, clip: CLIP) -> None:
        self._clip = clip

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], about 15-26 for pictures that fit."""
        return (self._clip.logit_scale * self._clip.cosines(images, prompts)).tolist()


def load(name: str, options: ScorerOptions) -> PickScore:
    """The scorer.

    Raises:
        MissingWeightsError: the weights are not here.
    """
    return PickScore(load_clip(SOURCES[0], options))
