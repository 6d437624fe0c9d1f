"""What a family's checkpoints consist of, in names only: nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ASSETS = Path(__file__).resolve().parent / "assets"
CLIP_VOCABULARY = ASSETS / "clip_tokenizer"

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."


@dataclass(frozen=True)
class TextPart:
    """A text encoder.

    Attributes:
        name: its folder in a diffusers model.
        tokenizer: the folder of its tokenizer.
        class_name: in transformers.
        prefix: of its tensors in a single file.
        layout: how a single file names them: as transformers does, or as open_clip does.
        pad_token: of its tokenizer in single files; None pads with the end token.
    """

    name: str
    tokenizer: str
    class_name: Literal["CLIPTextModel", "CLIPTextModelWithProjection"]
    prefix: str
    layout: Literal["clip", "open_clip"]
    pad_token: str | None = None


@dataclass(frozen=True)
class Blueprint:
    """A family as the loader sees it.

    Attributes:
        name: in `FAMILIES`.
        title: for messages.
        resolution: of the published models, pixels.
        text: its text encoders, in the order in which their embeddings are joined.
        configs: folder with config.json of unet, vae and text encoders and the scheduler's, for single files.
    """

    name: str
    title: str
    resolution: int
    text: tuple[TextPart, ...]
    configs: Path

    @property
    def components(self) -> tuple[str, ...]:
        """Folders that a diffusers model of this family must have."""
        return ("unet", "vae", *(t.name for t in self.text), *(t.tokenizer for t in self.text))


SDXL = Blueprint(
    name="sdxl",
    title="Stable Diffusion XL",
    resolution=1024,
    text=(
        TextPart("text_encoder", "tokenizer", "CLIPTextModel", "conditioner.embedders.0.", "clip"),
        TextPart(
            "text_encoder_2",
            "tokenizer_2",
            "CLIPTextModelWithProjection",
            "conditioner.embedders.1.model.",
            "open_clip",
            pad_token="!",
        ),
    ),
    configs=ASSETS / "sdxl",
)

SD15 = Blueprint(
    name="sd15",
    title="Stable Diffusion 1.5",
    resolution=512,
    text=(TextPart("text_encoder", "tokenizer", "CLIPTextModel", "cond_stage_model.", "clip"),),
    configs=ASSETS / "sd15",
)

BLUEPRINTS = {SDXL.name: SDXL, SD15.name: SD15}
