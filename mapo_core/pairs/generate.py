"""Rejected images from the base model, for those who have only the images they want.

"What the base model makes of the same prompt" is the rejected side: the paper's way to see fine-tuning as preference
alignment. Every image is made once, from a recorded seed, and kept; an interrupted generation goes on.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..drawing import Drawer, Drawing, model_identity, native_resolution
from ..errors import PairsError
from .findings import Finding
from .pair import PairSet, PreferencePair

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..buckets import Size
    from ..config import TrainConfig
    from ..evaluate import Embedder
    from .folders import Captioned

RECORD = "generated.jsonl"


@dataclass(frozen=True)
class GenerationSettings:
    """How rejected images are sampled.

    Attributes:
        num_inference_steps: sampling steps.
        guidance_scale: classifier-free guidance.
        seed: from which each image's own seed is derived.
        per_image: rejected images for each chosen one.
        min_distance: cosine distance of embeddings, 0-2, that a rejected image must have from its chosen one; 0 keeps
            every image. A larger one asks for pairs that differ more.
        attempts: how many seeds are tried until an image is far enough.
    """

    num_inference_steps: int = 25
    guidance_scale: float = 5.0
    seed: int = 0
    per_image: int = 1
    min_distance: float = 0.0
    attempts: int = 4


@dataclass(frozen=True)
class _Job:
    chosen: Captioned
    number: int  # which of the `per_image`
    size: Size


def generate_rejected(
    config: TrainConfig,
    chosen: Sequence[Captioned],
    folder: Path,
    settings: GenerationSettings | None = None,
    *,
    embedder: Embedder | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PairSet:
    """Make one or more rejected images for each chosen one, with its prompt, at its bucket's size.

    Args:
        config: model, resolution, buckets, device and precision are taken from it.
        chosen: images with their prompts.
        folder: where the images and `generated.jsonl` (file, prompt, seed, settings) are kept.
        settings: how to sample.
        embedder: measures how much two images differ; needed where `min_distance` is above 0.
        progress: called with images done and images in all; all may grow while too similar images are made again.

    Returns:
        The pairs, in the order of `chosen`, and a finding where some stayed too similar and were left out.

    Raises:
        PairsError: there is nothing to generate for, no pair is left, or the folder cannot be written.
        ModelError: the model cannot be loaded.
    """
    settings = settings or GenerationSettings()
    if not chosen:
        raise PairsError("There is no chosen image to generate a rejected one for. Check the folder and scan again.")
    if settings.min_distance > 0 and embedder is None:
        raise PairsError("To compare images, an embedder is needed: give one, or set min_distance to 0.")
    make_folder(folder)
    jobs = _jobs(config, chosen, settings)
    identity = model_identity(config.model)
    made: dict[_Job, Drawing] = {}
    waiting, finished = jobs, 0
    attempts = settings.attempts if settings.min_distance > 0 else 1
    with Drawer(config, settings.num_inference_steps, settings.guidance_scale) as drawer:
        for attempt in range(attempts):
            drawings = {j: _drawing(j, attempt, folder, settings, identity) for j in waiting}
            before, total = finished, finished + len(waiting)
            drawer.draw(
                list(drawings.values()),
                lambda done, _, before=before, total=total: progress(before + done, total),
                lambda drawing: record_drawing(folder, drawing, drawer),
            )
            finished = total
            if settings.min_distance <= 0 or embedder is None:
                made = drawings
                break
            distances = _distances(embedder, drawings)
            made |= {j: drawings[j] for j in waiting if distances[j] >= settings.min_distance}
            waiting = [j for j in waiting if j not in made]
            if not waiting:
                break
    if not made:
        raise PairsError(
            f"No generated image differs from its chosen one by {settings.min_distance:g} or more: the model draws "
            "them already. Ask for a smaller distance, or train without pairs: --method.type sft."
        )
    pairs = [_pair(config, j, made[j]) for j in jobs if j in made]
    return PairSet(pairs, _left_out(len(jobs) - len(made), len(jobs), settings), {"generated": len(pairs)})


def make_folder(folder: Path) -> None:
    """Make the folder of generated images.

    Raises:
        PairsError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PairsError(f"Cannot create {folder} for the generated images: {error.strerror}.") from error


def record_drawing(folder: Path, drawing: Drawing, drawer: Drawer) -> None:
    """Note the seed before the image appears, so that no image is without its record."""
    line = {
        "file": drawing.path.name,
        "prompt": drawing.prompt,
        "seed": drawing.seed,
        "width": drawing.size[0],
        "height": drawing.size[1],
        "model": drawer.config.model.path,
        "num_inference_steps": drawer.num_inference_steps,
        "guidance_scale": drawer.guidance_scale,
    }
    with (folder / RECORD).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def drawing_key(prompt: str, seed: int, size: Size, settings: GenerationSettings, identity: str) -> str:
    """What makes a generated image another one, as a short hash for its name."""
    parts = [prompt, seed, size, settings.num_inference_steps, settings.guidance_scale, identity]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _jobs(config: TrainConfig, chosen: Sequence[Captioned], settings: GenerationSettings) -> list[_Job]:
    from ..buckets import nearest_bucket
    from ..cache import pair_buckets
    from .images import image_size

    sizes = pair_buckets(config, native_resolution(config))
    found = [(item, nearest_bucket(image_size(item.image), sizes)) for item in chosen]
    return [_Job(item, n, size) for item, size in found for n in range(settings.per_image)]


def _drawing(job: _Job, attempt: int, folder: Path, settings: GenerationSettings, identity: str) -> Drawing:
    from ..noising import seed_of

    # not the place in the folder: a picture added to it must not change the seeds of the others
    seed = seed_of(settings.seed, "rejected", job.chosen.image.name, job.number, attempt) % 2**32
    key = drawing_key(job.chosen.prompt, seed, job.size, settings, identity)
    return Drawing(job.chosen.prompt, seed, job.size, folder / f"{job.chosen.image.stem}-{key}.png")


def _distances(embedder: Embedder, drawings: dict[_Job, Drawing]) -> dict[_Job, float]:
    """1 - cosine similarity of chosen and generated image, both fitted to the bucket."""
    from ..evaluate.embedding import embed_files

    jobs = list(drawings)
    chosen = embed_files(embedder, [j.chosen.image for j in jobs], [j.size for j in jobs])
    drawn = embed_files(embedder, [drawings[j].path for j in jobs], [j.size for j in jobs])
    return dict(zip(jobs, (1 - (chosen * drawn).sum(dim=1)).tolist(), strict=True))


def _pair(config: TrainConfig, job: _Job, drawing: Drawing) -> PreferencePair:
    made_by = f"rejected generated by {Path(config.model.path).name}, seed {drawing.seed}"
    return PreferencePair(
        prompt=job.chosen.prompt,
        chosen=job.chosen.image,
        rejected=drawing.path,
        source=f"{job.chosen.source}; {made_by}",
    )


def _left_out(count: int, total: int, settings: GenerationSettings) -> list[Finding]:
    if not count:
        return []
    return [
        Finding(
            "warning",
            "too-similar",
            f"{count} of {total} pairs were left out: after {settings.attempts} seeds the generated image still "
            f"differs by less than {settings.min_distance:g} from the chosen one.",
        )
    ]
