"""Aesthetic score: LAION's predictor on CLIP ViT-L/14, "sac+logos+ava1-l14-linearMSE".

github.com/christophschuhmann/improved-aesthetic-predictor: five linear layers without activations (dropout between
them in training) on the unit image embedding, trained on ratings from 1 to 10. The published file is a pickle; it is
read with weights_only and only if its hash is the one below.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import ModelError
from .clip_score import CLIP_L, load_clip
from .weights import WeightSource, find_weights, load_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from .clip_model import CLIP
    from .scorers import ScorerOptions

_FILE = "sac+logos+ava1-l14-linearMSE.pth"
SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
PREDICTOR = WeightSource(
    "aesthetic",
    "christophschuhmann/improved-aesthetic-predictor",
    (f"{_FILE}|*.safetensors",),
    "4 MB",
    url=f"https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/{_FILE.replace('+', '%2B')}",
    sha256=SHA256,
)
SOURCES = (CLIP_L, PREDICTOR)
_LAYERS = (0, 2, 4, 6, 7)  # of the Sequential; dropout stands between


class Aesthetic:
    """A rating of the picture alone; the prompt has no influence."""

    name = "aesthetic"
    title = "aesthetic score (LAION)"

    def __init__(self, clip: CLIP, tensors: dict[str, Tensor]) -> None:
        self._clip = clip
        self._layers = [(tensors[f"layers.{i}.weight"].float(), tensors[f"layers.{i}.bias"].float()) for i in _LAYERS]

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], about 1-10."""
        x = self._clip.images(images)  # [N, 768]
        for weight, bias in self._layers:
            x = x @ weight.T + bias
        return x[:, 0].tolist()


def load(name: str, options: ScorerOptions) -> Aesthetic:
    """The scorer.

    Raises:
        MissingWeightsError: CLIP or the predictor is not here.
        ModelError: the predictor is another file than the published one.
    """
    folder = find_weights(PREDICTOR, options.folders.get(PREDICTOR.name), options.download)
    path = _predictor_file(folder)
    tensors = load_tensors(path, SHA256)
    wanted = [f"layers.{i}.{part}" for i in _LAYERS for part in ("weight", "bias")]
    if lacking := [key for key in wanted if key not in tensors]:
        raise ModelError(f"{path} is not the aesthetic predictor: it lacks {', '.join(lacking)}.")
    return Aesthetic(load_clip(CLIP_L, options), tensors)


def _predictor_file(folder: Path) -> Path:
    return next(iter(sorted(folder.glob("*.safetensors"))), folder / _FILE)
