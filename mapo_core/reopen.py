"""Open a finished or stopped run again: its model with its LoRA, for pictures, measures and exports."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .adapter import add_lora, encode_prompts, load_adapter_state, lora_strength
from .base_weights import place_base
from .checkpoints import load_checkpoint
from .config import load_config
from .devices import DTYPES, choose_precision, preferred_device
from .errors import RunError
from .families import FAMILIES, detect
from .memory_plan import read_decision, with_plan
from .memory_use import free_cached, is_out_of_memory
from .runs import checkpoint_step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from .config import TrainConfig
    from .families.base import DiffusionModel, Family
    from .runs import RunDir

logger = logging.getLogger(__name__)


@dataclass
class TrainedModel:
    """A base model with a run's LoRA on it; the LoRA can be switched off with `adapter.adapter_off`.

    Attributes:
        config: of the run.
        model: with text encoders and VAE.
        family: of the model.
        step: of the checkpoint.
        state: what else the checkpoint holds.
    """

    config: TrainConfig
    model: DiffusionModel
    family: Family
    step: int
    state: dict


def open_trained(run: RunDir, step: int | None = None, device: str | None = None) -> TrainedModel:
    """Load a run's model and put the LoRA of a checkpoint on it.

    Args:
        run: the run folder.
        step: which checkpoint; None for the newest.
        device: where; None for the device the run was made for.

    Raises:
        RunError: there is no such checkpoint.
    """
    config = load_config(run.config)
    path = _checkpoint_of(run, step)
    kept = load_checkpoint(path)
    where = preferred_device(device or config.training.device)
    precision = choose_precision(config.training.precision, where)
    family = FAMILIES[detect(config.model.path, config.model.family).family]
    cuda = where.type == "cuda"
    model = family.load(config.model, device="cpu" if cuda else where, dtype=DTYPES[precision])
    add_lora(model, family, config.adapter, config.seed, run.start_lora if config.adapter.init_from else None)
    load_adapter_state(model, kept.lora)
    model.unet.eval()
    _to_device(model, where, run)
    return TrainedModel(config, model, family, kept.step, kept.others)


def _to_device(model: DiffusionModel, device: torch.device, run: RunDir) -> None:
    """The full base, with encoders, on the device; where that does not fit, the base as the run was trained with."""
    try:
        place_base(model.unet, device)
        model.encoders_to(device)
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    model.unet.to("cpu")
    free_cached(device)
    decided = read_decision(run)
    asked = load_config(run.config).memory.base_precision
    form = decided.plan.base_precision if decided else "full" if asked == "auto" else asked
    share = decided.plan.offload_share if decided else 0.0
    if form == "full" and not share:
        share = 1.0
    logger.warning(
        "The full base does not fit on %s: what follows uses it in %s with %.0f%% of its blocks offloaded.",
        device,
        form,
        100 * share,
    )
    place_base(model.unet, device, form, share)
    model.encoders_to(device)


def export_run(
    run: RunDir,
    *,
    step: int | None = None,
    layout: str | None = None,
    precision: str | None = None,
    out: Path | None = None,
    rank: int | None = None,
) -> Path:
    """Write the LoRA of a checkpoint again.

    Args:
        run: the run folder.
        step: which checkpoint; None for the newest.
        layout: "kohya" or "diffusers"; None for the run's setting.
        precision: "fp32", "fp16" or "bf16"; None for the run's setting.
        out: the file to write; None for one in the run's export folder whose name says step, layout and precision.

        rank: of the written LoRA where the trained one has more; None for the run's setting.

    Raises:
        RunError: there is no such checkpoint, or `out` exists.
        ExportError: the file does not give back what was trained.
    """
    from .export import export_lora
    from .new_tokens import export_tokens

    if out is not None and out.exists():
        raise RunError(f"{out} exists. Give another --out; nothing is overwritten.")
    trained = open_trained(run, step)
    layout = layout or trained.config.export.layout
    precision = precision or trained.config.export.precision
    form = f"{layout}-{precision}{f'-rank{rank}' if rank else ''}"
    path = out or run.export / f"{run.name}-{trained.step:08d}-{form}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    report = export_lora(
        trained.model,
        trained.family,
        path,
        layout=layout,  # pyright: ignore[reportArgumentType]
        precision=precision,  # pyright: ignore[reportArgumentType]
        rank=rank or trained.config.export.rank,
        metadata=run_metadata(run, trained.config, trained.model, trained.family, trained.step, trained.state),
    )
    export_tokens(trained.model, report.path)
    return report.path


def compare_run(
    run: RunDir,
    *,
    steps: Sequence[int | None] = (None,),
    prompts: Sequence[str] | None = None,
    seed: int | None = None,
    strengths: Sequence[float] = (1.0,),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Draw prompts with the base model and with the LoRA at some checkpoints and strengths, same seeds, in one sheet.

    Args:
        run: the run folder.
        steps: which checkpoints; None for the newest.
        prompts: what to draw; None for the run's validation prompts.
        seed: of the first picture; prompt i uses seed + i.
        strengths: of the LoRA; every checkpoint has a row for each.
        progress: called with pictures done and pictures in all.

    Returns:
        The sheet, in the run's samples folder; the pictures lie in the folder of the same name
        (`comparisons.run_comparisons`).

    Raises:
        RunError: there is no such checkpoint.
    """
    from .comparisons import write_index
    from .pairs import open_pairs
    from .sampling import contact_sheet, sample_images, save_image, save_pictures
    from .session import validation_prompts

    paths = [_checkpoint_of(run, step) for step in dict.fromkeys(steps)]
    trained = open_trained(run, checkpoint_step(paths[0]))
    config, model, family = trained.config, trained.model, trained.family
    settings = config.validation
    texts = list(prompts or validation_prompts(config, open_pairs(run.pairs)))
    side = config.data.resolution or model.resolution
    first = settings.seed if seed is None else seed
    total = len(texts) * (1 + len(paths) * len(strengths))
    rows: list[list[Any]] = []

    def draw(base: bool, title: str) -> None:
        before = len(rows) * len(texts)
        encoded = encode_prompts(model, family, [*texts, settings.negative_prompt], base=base)
        pictures = sample_images(
            model,
            family,
            encoded[:-1],
            encoded[-1],
            [first + i for i in range(len(texts))],
            width=settings.width or side,
            height=settings.height or side,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            base=base,
            progress=lambda done, _: progress(before + done, total),
        )
        rows.append(pictures)
        titles.append(title)

    titles: list[str] = []
    draw(True, "base")
    for path in paths:
        load_adapter_state(model, load_checkpoint(path).lora)
        for strength in strengths:
            with lora_strength(model, strength):
                draw(False, (f"step {checkpoint_step(path)}, " if len(paths) > 1 else "") + f"strength {strength:g}")
    name = "compare_" + "_".join(f"{checkpoint_step(path):08d}" for path in paths[:4])
    sheet, number = run.samples / f"{name}.png", 1
    while sheet.exists():
        number += 1
        sheet = run.samples / f"{name}-{number}.png"
    for i, pictures in enumerate(rows):
        save_pictures(pictures, sheet.with_suffix("") / f"row_{i:02d}")
    save_image(contact_sheet(rows, titles, texts), sheet)
    folders = [(title, f"row_{i:02d}") for i, title in enumerate(titles)]
    where = ", ".join(str(checkpoint_step(path)) for path in paths)
    write_index(sheet.with_suffix(""), f"drawn at step {where}", texts, folders, sheet)
    return sheet


def _checkpoint_of(run: RunDir, step: int | None) -> Path:
    path = run.latest_checkpoint() if step is None else run.checkpoint_path(step)
    if path is None or not path.exists():
        steps = [checkpoint_step(p) for p in run.list_checkpoints()]
        there = f"there are {', '.join(map(str, steps))}" if steps else "it was stopped before its first one"
        raise RunError(f"Run {run.name} has no checkpoint{'' if step is None else f' of step {step}'}: {there}.")
    return path


def run_metadata(
    run: RunDir, config: TrainConfig, model: DiffusionModel, family: Family, step: int, state: dict
) -> dict[str, str]:
    """What the LoRA file says about its making.

    Args:
        run: the run folder; the thumbnail is its first validation picture of that step, if there is one.
        config: of the run.
        model: as loaded.
        family: of the model.
        step: optimizer steps done.
        state: `Session.progress_state()`, or what a checkpoint kept of it.
    """
    from PIL import Image

    from . import __version__
    from .export import lora_metadata
    from .pairs import open_pairs, pairs_hash

    decided = read_decision(run)
    if decided is not None:
        config = with_plan(config, decided.plan)  # what it was trained with
    pairs = open_pairs(run.pairs)
    held, base = state.get("held_out"), state.get("held_out_base")
    measures = {**held, "accuracy_base": base["accuracy"], "margin_base": base["margin"]} if held and base else None
    picture = run.samples / f"step_{step:08d}" / "00.png"
    return lora_metadata(
        config,
        family,
        steps_done=step,
        pairs_count=len(pairs) - (held["pairs"] if held else 0),
        pairs_sha256=pairs_hash(pairs),
        base_model_name=config.model.path,
        held_out=measures,
        thumbnail=Image.open(picture) if picture.exists() else None,
        started=state.get("started_at"),
        finished=time.time(),
        precision=choose_precision(config.training.precision, model.device),
        prediction_type=model.prediction_type,
        resolution=model.resolution,
        version=__version__,
    )
