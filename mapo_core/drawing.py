"""Draw many pictures with the base model, each into a file of its own; what is there already is not drawn again."""

from __future__ import annotations

import gc
import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType
    from typing import Self

    from .buckets import Size
    from .config import TrainConfig
    from .families.base import DiffusionModel
    from .sections import ModelConfig

_BATCH_PIXELS = 512 * 512


@dataclass(frozen=True)
class Drawing:
    """One picture to draw.

    Attributes:
        prompt: what to draw.
        seed: of its noise.
        size: (width, height), pixels.
        path: the PNG file.
    """

    prompt: str
    seed: int
    size: Size
    path: Path

    @property
    def done(self) -> bool:
        """Whether it is drawn; files are moved into place, so one that exists is whole."""
        return self.path.exists() and self.path.stat().st_size > 0


class Drawer:
    """The base model of some settings, loaded when the first picture is missing, and let go by `close`.

    Args:
        config: model, device and precision are taken from it.
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance; 1 or less is without.
    """

    def __init__(self, config: TrainConfig, num_inference_steps: int, guidance_scale: float) -> None:
        self.config = config
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self._model: DiffusionModel | None = None

    def __enter__(self) -> Self:
        """Nothing is loaded yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the model go."""
        self.close()

    def close(self) -> None:
        """Give the model's memory back."""
        if self._model is None:
            return
        import torch

        self._model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def draw(
        self,
        drawings: Sequence[Drawing],
        progress: Callable[[int, int], None] = lambda done, total: None,
        before: Callable[[Drawing], None] = lambda drawing: None,
    ) -> None:
        """Draw what is missing.

        Args:
            drawings: the pictures.
            progress: called with pictures done (those found included) and pictures in all.
            before: called before a picture is put in its place, for example to record its seed.

        Raises:
            ModelError: the model cannot be loaded.
        """
        missing = [d for d in drawings if not d.done]
        done = len(drawings) - len(missing)
        progress(done, len(drawings))
        if not missing:
            return
        import torch

        from .devices import DTYPES, choose_precision, preferred_device
        from .families import FAMILIES, detect
        from .sampling import sample_images, save_image

        device = preferred_device(self.config.training.device)
        dtype = DTYPES[choose_precision(self.config.training.precision, device)]
        family = FAMILIES[detect(self.config.model.path, self.config.model.family).family]
        model = self._model = self._model or family.load(self.config.model, device=device, dtype=dtype)
        prompts = list(dict.fromkeys(["", *(d.prompt for d in missing)]))
        for encoder in model.text_encoders:
            encoder.to(device)
        embeds = dict(zip(prompts, family.encode_prompts(model, prompts), strict=True))
        for encoder in model.text_encoders:
            encoder.to("cpu")  # the denoiser needs the room
        for size in dict.fromkeys(d.size for d in missing):
            same_size = [d for d in missing if d.size == size]
            step = max(1, min(16, _BATCH_PIXELS // (size[0] * size[1])))
            for start in range(0, len(same_size), step):
                part = same_size[start : start + step]
                with torch.autocast(device.type, dtype) if dtype != torch.float32 else nullcontext():
                    pictures = sample_images(
                        model,
                        family,
                        [embeds[d.prompt] for d in part],
                        embeds[""],
                        [d.seed for d in part],
                        width=size[0],
                        height=size[1],
                        num_inference_steps=self.num_inference_steps,
                        guidance_scale=self.guidance_scale,
                    )
                for drawing, picture in zip(part, pictures, strict=True):
                    before(drawing)
                    save_image(picture, drawing.path)
                done += len(part)
                progress(done, len(drawings))


def native_resolution(config: TrainConfig) -> int:
    """Side of the model's own square picture, pixels, without loading it."""
    from .families import FAMILIES, detect

    if config.model.path == "demo":
        return 64
    return FAMILIES[detect(config.model.path, config.model.family).family].resolution


def model_identity(model: ModelConfig) -> str:
    """What makes a model another one, as text: its settings, and of a file its size and time.

    Raises:
        ModelError: the path cannot be looked at.
    """
    identity: dict[str, object] = model.model_dump()
    path = Path(model.path).expanduser()
    try:
        if path.is_file():
            stat = path.stat()
            identity |= {"bytes": stat.st_size, "modified": stat.st_mtime_ns}
    except OSError as error:
        raise ModelError(f"Cannot look at {path}: {error.strerror}. Check the path.") from error
    return json.dumps(identity, sort_keys=True)
