"""The small classifier that says what is in a picture of the demo world, and in which style it is drawn.

It measures the demo model and the LoRAs trained on it: style score, object and colour fidelity. It is trained by
`scripts/pretrain_demo.py` on real renders, never on what a model generated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .scenes import BACKGROUNDS, COLOURS, OBJECTS, SIZE, STYLES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from .scenes import Scene

CLASSIFIER_FILE = Path(__file__).parent / "classifier.safetensors"
HEADS: dict[str, tuple[str, ...]] = {
    "style": STYLES,
    "object": OBJECTS,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
}
_GRID = 16  # side of the feature map


class SceneClassifier(nn.Module):
    """Convolutions, pooled over the region of one object, and one linear head per question."""

    def __init__(self) -> None:
        super().__init__()

        def block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU())

        self.features = nn.Sequential(
            block(3, 24, 2), block(24, 48, 2), block(48, 64, 1), block(64, 96, 1), block(96, 96, 1), block(96, 96, 1)
        )
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(labels)) for name, labels in HEADS.items()})

    def forward(self, images: Tensor, regions: Tensor) -> dict[str, Tensor]:
        """Args: images [B, 3, 64, 64] in [-1, 1]; regions [B, 1, 16, 16], 1 where the object is. Logits per head."""
        x = self.features(images)  # [B, 96, 16, 16]
        mean = (x * regions).sum((2, 3)) / regions.sum((2, 3))
        peak = (x * regions).amax((2, 3))  # features are >= 0 (ReLU)
        pooled = torch.cat([mean, peak], dim=1)  # [B, 192]
        return {name: head(pooled) for name, head in self.heads.items()}


@dataclass(frozen=True)
class SceneScores:
    """Per picture, [N]: is every object right, every colour, both; and the probability of each style, [N, styles]."""

    objects: np.ndarray
    colours: np.ndarray
    both: np.ndarray
    background: np.ndarray
    styles: np.ndarray

    def style(self, name: str) -> np.ndarray:
        """The probability of a style per picture, [N], 0-1."""
        return self.styles[:, STYLES.index(name)]


def load_classifier(path: Path = CLASSIFIER_FILE) -> SceneClassifier:
    """The classifier that ships with the package, in evaluation mode, float32, on the CPU."""
    from safetensors.torch import load_file

    model = SceneClassifier()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(path).items()})
    return model.eval()


def regions_of(scene: Scene) -> Tensor:
    """The part of the picture where each thing of a scene belongs, [things, 1, 16, 16]."""
    regions = torch.zeros(len(scene.things), 1, _GRID, _GRID)
    half = _GRID // 2
    if scene.relation == "left of":
        regions[0, :, :, :half] = 1
        regions[1, :, :, half:] = 1
    elif scene.relation == "above":
        regions[0, :, :half] = 1
        regions[1, :, half:] = 1
    else:
        regions[:] = 1
    return regions


def labels_of(scene: Scene, style: str) -> Tensor:
    """Class indices in the order of `HEADS`, [things, 4]."""
    return torch.tensor(
        [
            [
                STYLES.index(style),
                OBJECTS.index(t.name),
                HEADS["colour"].index(t.colour),
                HEADS["background"].index(scene.background),
            ]
            for t in scene.things
        ]
    )


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    """Pictures as [N, 3, 64, 64] in [-1, 1]."""
    arrays = [np.asarray(im.convert("RGB").resize((SIZE, SIZE)), dtype=np.float32) for im in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def score_pictures(
    images: Sequence[Image.Image], scenes: Sequence[Scene], classifier: SceneClassifier | None = None
) -> SceneScores:
    """Compare pictures with the scenes that they should show.

    Args:
        images: N pictures of any size.
        scenes: the N scenes whose captions they were generated from.
        classifier: the one to use; the shipped one by default.
    """
    classifier = classifier or load_classifier()
    batch = to_batch(images)
    counts = [len(s.things) for s in scenes]
    owner = torch.repeat_interleave(torch.arange(len(scenes)), torch.tensor(counts))  # [things]
    logits = classifier(batch[owner], torch.cat([regions_of(s) for s in scenes]))
    truth = torch.cat([labels_of(s, STYLES[0]) for s in scenes])

    def all_right(right: Tensor) -> np.ndarray:
        wrong = torch.zeros(len(scenes)).index_add_(0, owner, (~right).float())
        return (wrong == 0).numpy()

    right = {name: logits[name].argmax(1) == truth[:, i] for i, name in enumerate(HEADS)}
    style = torch.zeros(len(scenes), len(STYLES)).index_add_(0, owner, logits["style"].softmax(1))
    return SceneScores(
        objects=all_right(right["object"]),
        colours=all_right(right["colour"]),
        both=all_right(right["object"] & right["colour"]),
        background=all_right(right["background"]),
        styles=(style / torch.tensor(counts)[:, None]).numpy(),
    )
