"""The demo model's own measures: its classifier's features as embedding, and its verdicts as scores. No download.

They know the drawn scenes of `mapo_core/demo` and nothing else; for other models take the published scorers.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from ..demo.classifier import load_classifier, score_pictures, to_batch
from ..demo.scenes import STYLES, render, scene_of_caption, scenes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

    from .scorers import ScorerOptions
    from .weights import WeightSource

SOURCES: tuple[WeightSource, ...] = ()  # the classifier ships with the package
_RENDERS = 256  # drawn scenes, all styles, that say how large each feature usually is


class DemoEmbedder:
    """Features of the classifier, pooled over the picture.

    Every feature is standardised over drawn scenes of all styles: without that, the few with the largest values, which
    tell colours apart, hide the others.
    """

    name = "demo"
    title = "features of the demo world's classifier"

    def __init__(self) -> None:
        self._classifier = load_classifier()
        drawn = zip(itertools.islice(scenes(99, held_out=False), _RENDERS), itertools.cycle(STYLES), strict=False)
        usual = self._features([render(scene, style) for scene, style in drawn])
        self._mean, self._std = usual.mean(dim=0), usual.std(dim=0) + 1e-3

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """[N, 192] float32 on the CPU, L2-normalised."""
        return normalize((self._features(images) - self._mean) / self._std, dim=1)

    @torch.no_grad()
    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        x = self._classifier.features(to_batch(images))  # [N, 96, 16, 16]
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)


class DemoStyle:
    """Probability that a picture is drawn in the wanted style.

    Args:
        references: pictures in that style; without any, the style is the one that the prompt names.
    """

    name = "demo-style"
    title = "wanted style, probability"

    def __init__(self, references: Sequence[Image.Image] = ()) -> None:
        self._classifier = load_classifier()
        self.style = STYLES[int(self._styles(references).mean(dim=0).argmax())] if references else None

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], 0-1; not a number where the style is neither shown nor named."""
        wanted = [self.style or next((s for s in STYLES if f"{s} style" in p), None) for p in prompts]
        found = self._styles(images)
        return [
            float("nan") if s is None else row[STYLES.index(s)].item() for s, row in zip(wanted, found, strict=True)
        ]

    @torch.no_grad()
    def _styles(self, images: Sequence[Image.Image]) -> Tensor:
        batch = to_batch(images)
        everywhere = torch.ones(len(batch), 1, 16, 16)
        return self._classifier(batch, everywhere)["style"].softmax(dim=1)  # [N, styles]


class DemoContent:
    """Whether objects and colours are all as the prompt says; not a number where the prompt describes no scene."""

    name = "demo-content"
    title = "objects and colours as in the prompt, share"

    def __init__(self) -> None:
        self._classifier = load_classifier()

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], 0 or 1."""
        known = [(i, scene) for i, p in enumerate(prompts) if (scene := scene_of_caption(p)) is not None]
        found = [float("nan")] * len(images)
        if known:
            scenes_: list[Any] = [scene for _, scene in known]
            both = score_pictures([images[i] for i, _ in known], scenes_, self._classifier).both
            for (i, _), right in zip(known, both.tolist(), strict=True):
                found[i] = float(right)
        return found


def load(name: str, options: ScorerOptions) -> DemoStyle | DemoContent:
    """One of the two scorers."""
    return DemoContent() if name == "demo-content" else DemoStyle(options.references)
