"""What a run would need, measured before it exists: memory, pace, time, disk, and the savings that it would use."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import pair_buckets
from .console import duration
from .families import FAMILIES, detect
from .memory_plan import GIB, Plan, read_decision, savings_words
from .methods import DreamBoothConfig
from .pairs import PreferencePair, pairs_text
from .pairs.images import image_size
from .pairs.views import count_different
from .runs import EventWriter, RunDir, read_events
from .sections import TrackingConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .config import TrainConfig

_DEMO_RESOLUTION = 64


@dataclass(frozen=True)
class Needs:
    """What a run would need.

    Attributes:
        plan: the savings that it would use.
        rungs: those of them that were added because it did not fit without.
        peak_memory_bytes: of two steps on the largest pictures, on the device; of the process where there is none.
        budget_bytes: what it may take.
        seconds_per_step, seconds_total: of a step, and of all of them without pictures and measures.
        cache_bytes: disk that the encoded images, prompts and masks will take, about.
        base_error: how far the frozen model is off in fewer bits; None in full precision.
        device, resolution, family: of the run.
    """

    plan: Plan
    rungs: tuple[str, ...]
    peak_memory_bytes: int
    budget_bytes: int
    seconds_per_step: float
    seconds_total: float
    cache_bytes: int
    base_error: float | None
    device: str
    resolution: int
    family: str

    def render(self) -> str:
        """For people."""
        return "\n".join(
            [
                f"{self.family} at {self.resolution} px on {self.device}",
                f"memory          {self.peak_memory_bytes / GIB:.2f} GiB of {self.budget_bytes / GIB:.2f} GiB",
                f"pace            {self.seconds_per_step:.2f} s per step",
                f"time            {duration(self.seconds_total)}, pictures and measures not counted",
                f"disk for cache  {self.cache_bytes / GIB:.2f} GiB",
                f"savings         {savings_words(self.plan, self.base_error)}",
                f"added to fit    {', '.join(self.rungs) or 'none'}",
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**self.__dict__, "plan": self.plan.model_dump(), "rungs": list(self.rungs)}


def preflight(
    config: TrainConfig,
    pairs: Sequence[PreferencePair] = (),
    *,
    progress: Callable[[str], None] = lambda what: None,
) -> Needs:
    """Load the model, encode the largest pair, take two steps with it, and leave nothing behind but the cache of it.

    Args:
        config: of the run.
        pairs: of the run; without any, a pair of noise at the largest size stands in.
        progress: called with what is being done.

    Raises:
        MapoError: it cannot be trained, or does not fit whatever is saved.
    """
    from .session import prepare

    family = FAMILIES[detect(config.model.path, config.model.family).family]
    native = _DEMO_RESOLUTION if config.model.path == "demo" else family.resolution
    with tempfile.TemporaryDirectory(prefix="mapo-preflight-") as folder:
        run = RunDir(Path(folder))
        worst = largest_pair(pairs, config, native) if pairs else noise_pair(run.path, config.data.resolution or native)
        method = config.method
        if isinstance(method, DreamBoothConfig):
            method = method.model_copy(update={"class_images": 1})
        asked = config.model_copy(
            update={
                "method": method,
                "memory": config.memory.model_copy(update={"preflight": "on"}),
                "data": config.data.model_copy(update={"held_out": 0.0}),
                "tracking": TrackingConfig(),
            }
        )
        run.config.write_text(asked.to_json(), encoding="utf-8")
        run.pairs.write_text(pairs_text([worst]), encoding="utf-8")
        with EventWriter(run) as events:
            progress("loading, encoding and measuring")
            session = prepare(run, events, None)
        decision = read_decision(run)
        said = next(e for e in reversed(read_events(run.events)) if e.get("phase") == "memory plan")
        assert decision is not None
        size = session.config.data.resolution or session.model.resolution
        prompt = sum(t.nbytes for t in session.pairs.prompt(worst.prompt).values())
        if config.cache.precision == "bf16":
            prompt //= 2
        return Needs(
            plan=decision.plan,
            rungs=decision.rungs,
            peak_memory_bytes=said["peak_memory_bytes"],
            budget_bytes=said["budget_bytes"],
            seconds_per_step=said["seconds_per_step"],
            seconds_total=said["seconds_per_step"] * config.training.steps,
            cache_bytes=cache_bytes(pairs or [worst], config, size * size // session.model.latent_scale**2, prompt),
            base_error=decision.base_error,
            device=str(session.accelerator.device),
            resolution=size,
            family=session.family.title,
        )


def largest_pair(pairs: Sequence[PreferencePair], config: TrainConfig, native_resolution: int) -> PreferencePair:
    """The pair that is trained with the most pixels and, of those, the longest prompt."""
    from .buckets import nearest_bucket

    sizes = pair_buckets(config, native_resolution)

    def size(pair: PreferencePair) -> tuple[int, int]:
        width, height = nearest_bucket(image_size(pair.chosen), sizes)
        return width * height, len(pair.prompt)

    return max(pairs, key=size)


def noise_pair(folder: Path, side: int) -> PreferencePair:
    """A pair of noise, where there are no images yet; memory and pace do not depend on what is in them."""
    import random

    from PIL import Image

    rng = random.Random(0)
    paths = []
    for name in ("chosen", "rejected"):
        path = folder / f"{name}.png"
        Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(path)
        paths.append(path)
    return PreferencePair(prompt="a picture", chosen=paths[0], rejected=paths[1])


def cache_bytes(pairs: Sequence[PreferencePair], config: TrainConfig, latent_pixels: int, prompt_bytes: int) -> int:
    """Disk of the cache, about: mean and spread of four channels per image, the embeddings of every prompt, and masks.

    Of images whose transparency is the mask it counts a mask for each, because telling which have some takes a look
    into every file.
    """
    number = 2 if config.cache.precision == "bf16" else 4
    images = count_different(str(p) for pair in pairs for p in (pair.chosen, pair.rejected))
    prompts = count_different(
        p for pair in pairs for p in (pair.prompt, pair.rejected_prompt, pair.base_prompt) if p is not None
    )
    masks = 0
    if config.loss.mask == "alpha":
        masks = images
    elif config.loss.mask == "file":
        masks = count_different(
            f"{mask}\0{image}"
            for pair in pairs
            for image, mask in ((pair.chosen, pair.chosen_mask), (pair.rejected, pair.rejected_mask))
            if mask is not None
        )
    latents = images * (2 if config.data.flip else 1) * latent_pixels * 4 * 2 * number
    return latents + (prompts + 1) * prompt_bytes + masks * latent_pixels * 4
