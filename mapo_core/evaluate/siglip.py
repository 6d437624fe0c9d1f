"""SigLIP 2: how well a picture fits its prompt, from a model trained with a sigmoid per pair.

Zhai et al.: *Sigmoid Loss for Language Image Pre-Training*, 2023, arXiv 2303.15343; Tschannen et al.: *SigLIP 2*, 2025,
arXiv 2502.14786. The score is the logit, scale x cosine + bias: above 0 the model takes picture and text for a pair.
SigLIP 2 and not 1, whose tokenizer needs a further package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import normalize

from ..families._quiet import quiet_import_notices
from .vision import HALF_MEAN, HALF_STD, pixel_values
from .weights import WeightSource, find_weights, load_pretrained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image
    from torch import Tensor

    from .scorers import ScorerOptions

SOURCES = (
    WeightSource(
        "siglip", "google/siglip2-base-patch16-224", ("config.json", "*.safetensors", "tokenizer.json"), "1.5 GB"
    ),
)
_LENGTH = 64  # tokens; SigLIP is trained on texts padded to this length
_PAD = 0
_BATCH = 16


class SigLIP:
    """Args: the model, complete, and its tokenizer."""

    name = "siglip"
    title = "SigLIP 2 text-image logit"

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._device = device

    @torch.no_grad()
    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """[N], any number; larger fits better."""
        side = self._model.config.vision_config.image_size
        found: list[float] = []
        for start in range(0, len(images), _BATCH):
            x = pixel_values(images[start : start + _BATCH], side, HALF_MEAN, HALF_STD, fitting="squash")
            seen = self._model.vision_model(pixel_values=x.to(self._device)).pooler_output
            ids = self._ids(prompts[start : start + _BATCH]).to(self._device)
            read = self._model.text_model(input_ids=ids).pooler_output
            cosine = (normalize(seen.float(), dim=1) * normalize(read.float(), dim=1)).sum(dim=1)
            logits = cosine * self._model.logit_scale.exp() + self._model.logit_bias
            found += logits.tolist()
        return found

    def _ids(self, prompts: Sequence[str]) -> Tensor:
        """[B, 64]: in lower case, cut or padded, the end token kept."""
        rows: list[list[int]] = []
        for prompt in prompts:
            ids = self._tokenizer(prompt.lower())["input_ids"]
            ids = [*ids[: _LENGTH - 1], ids[-1]] if len(ids) > _LENGTH else ids
            rows.append([*ids, *[_PAD] * (_LENGTH - len(ids))])
        return torch.tensor(rows)


def load(name: str, options: ScorerOptions) -> SigLIP:
    """The scorer.

    Raises:
        MissingWeightsError: the weights are not here.
    """
    quiet_import_notices()
    path = find_weights(SOURCES[0], options.folders.get(SOURCES[0].name), options.download)
    from transformers import PreTrainedTokenizerFast, SiglipModel

    from ..devices import preferred_device

    device = preferred_device(options.device)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    return SigLIP(load_pretrained(SiglipModel, path, device), tokenizer, device)
