"""Pictures of a class, drawn by the base model before it is trained: what DreamBooth must not forget."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .noising import seed_of
from .pairs.generate import GenerationSettings
from .pairs.pair import PreferencePair
from .runs import mapo_home, write_atomic
from .sampling import sample_images, save_image

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import Any

    import torch
    from torch import Tensor, nn

    from .config import TrainConfig
    from .families.base import DiffusionModel, Family

_BATCH_PIXELS = 512 * 512


def class_pairs(
    model: DiffusionModel,
    family: Family,
    config: TrainConfig,
    prompt: str,
    count: int,
    *,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Callable[[str, int, int], None],
) -> list[PreferencePair]:
    """The class images as pairs, so that they are cached like all others; those that are missing are drawn first.

    Pictures are kept below `MAPO_HOME` by model, prompt, size and sampler, and a larger `count` adds to them. Their
    seeds do not depend on the run's.

    Args:
        model: the base model, with VAE and text encoders.
        family: of the model.
        config: of the run; model and resolution matter here.
        prompt: of the class.
        count: pictures.
        autocast: context of the arithmetic.
        progress: called with what is done, how many are, and of how many.
    """
    side = config.data.resolution or model.resolution
    sampler = GenerationSettings()
    folder = mapo_home() / "class_images" / _digest(model, prompt, side, sampler)
    paths = [folder / f"{n:05d}.png" for n in range(count)]
    missing = [n for n, path in enumerate(paths) if not path.exists()]  # moved into place, so one that exists is whole
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"prompt": prompt, "model": config.model.path, "side": side, "sampler": _sampling(sampler)}
        write_atomic(folder / "about.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        encoded = family.encode_prompts(model, [prompt, ""])
        _move(model.text_encoders, "cpu")  # the denoiser needs the room
        _draw(model, family, encoded, missing, paths, side, sampler, autocast, progress)
        _move(model.text_encoders, model.device)
    return [PreferencePair(prompt=prompt, chosen=path, rejected=path) for path in paths]


def _draw(
    model: DiffusionModel,
    family: Family,
    encoded: list[dict[str, Tensor]],
    missing: list[int],
    paths: list[Path],
    side: int,
    sampler: GenerationSettings,
    autocast: Callable[[], AbstractContextManager[Any]],
    progress: Callable[[str, int, int], None],
) -> None:
    step = max(1, min(16, _BATCH_PIXELS // side**2))
    for start in range(0, len(missing), step):
        part = missing[start : start + step]
        progress("drawing class images", len(paths) - len(missing) + start, len(paths))
        pictures = sample_images(
            model,
            family,
            [encoded[0]] * len(part),
            encoded[1],
            [class_seed(n) for n in part],
            width=side,
            height=side,
            num_inference_steps=sampler.num_inference_steps,
            guidance_scale=sampler.guidance_scale,
            autocast=autocast,
        )
        for n, picture in zip(part, pictures, strict=True):
            save_image(picture, paths[n])
    progress("drawing class images", len(paths), len(paths))


def _move(modules: list[nn.Module], device: torch.device | str) -> None:
    for module in modules:
        module.to(device)


def class_seed(number: int) -> int:
    """The seed of class image `number`."""
    return seed_of("class image", number) % 2**32


def _sampling(settings: GenerationSettings) -> dict[str, float]:
    """What of the settings changes a class image."""
    return {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}


def _digest(model: DiffusionModel, prompt: str, side: int, sampler: GenerationSettings) -> str:
    """A folder name that changes with whatever changes the pictures."""
    source = Path(model.source).expanduser()
    stat = source.stat() if source.is_file() else None
    parts = [
        model.source,
        (stat.st_size, stat.st_mtime_ns) if stat else None,
        model.fingerprint,
        model.prediction_type,
        model.extras,
        prompt,
        side,
        _sampling(sampler),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
