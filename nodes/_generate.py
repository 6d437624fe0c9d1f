"""How Generate Rejected draws: by ComfyUI's own sampler, or by checkpoint name in a child process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..mapo_core import ConfigError, merge_settings
from ..mapo_core.pairs import (
    GenerationSettings,
    PairSet,
    draw_rejected,
    load_pairs,
    prompts_from_folder,
    rejected_folder,
)
from . import _comfy
from ._job import job

WIRED = "use the wired model"


@dataclass(frozen=True)
class Request:
    """What the node was asked for."""

    folder: Path
    words: dict[str, Any]
    per_image: int
    steps: int
    cfg: float
    seed: int
    settings: dict[str, Any]


def with_checkpoint(request: Request, checkpoint: str, bar: _comfy.Progress) -> PairSet:
    """In a process of its own, with the trainer's own model code."""
    base = {"name": "rejected", "data": {"pairs": "pairs.jsonl"}}
    model = {"model": {"path": _comfy.checkpoint_path(checkpoint)}}
    result = job(
        "generate_rejected",
        {
            "settings": merge_settings(base, request.settings, model),
            "chosen": str(request.folder),
            **request.words,
            "per_image": request.per_image,
            "num_inference_steps": request.steps,
            "guidance_scale": request.cfg,
            "seed": request.seed,
        },
        bar,
    )
    return PairSet(load_pairs(Path(result["pairs"])))


def with_comfy(request: Request, model: Any, clip: Any, vae: Any, bar: _comfy.Progress) -> PairSet:
    """With the models that are wired in; they stay loaded.

    Raises:
        ConfigError: one of them is missing.
    """
    missing = [name for name, part in (("model", model), ("clip", clip), ("vae", vae)) if part is None]
    if missing:
        raise ConfigError(f"Generate Rejected: wire {', '.join(missing)} in, or choose a checkpoint by name.")
    data = request.settings.get("data", {})

    def draw(prompt: str, seed: int, size: tuple[int, int]) -> Any:
        return _comfy.sample(model, clip, vae, prompt, "", seed, size, request.steps, request.cfg)

    made = draw_rejected(
        prompts_from_folder(request.folder, **request.words),
        rejected_folder(request.folder),
        draw,
        GenerationSettings(request.steps, request.cfg, request.seed, request.per_image),
        resolution=data.get("resolution") or _comfy.native_side(model),
        bucket=data.get("bucket", True),
        bucket_step=data.get("bucket_step"),
        max_aspect=data.get("max_aspect", 2.0),
        model=_comfy.model_identity(model, clip, vae),
        progress=bar.check,
    )
    return PairSet(made)
