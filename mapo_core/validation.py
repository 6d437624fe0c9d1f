"""What a run shows of itself: held-out measures, pictures, checkpoints and the LoRA file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from PIL import Image

from . import checkpoints
from .adapter import encode_prompts
from .evaluate.held_out import HeldOutErrors, held_out_errors
from .export import export_lora
from .memory import spared
from .new_tokens import export_tokens
from .reopen import run_metadata
from .sampling import contact_sheet, sample_images, save_image, save_pictures
from .session import throttled, validation_prompts
from .sharding import main_work
from .state import take_with_good, weights_in_use

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .session import Session


CHOSEN_ERROR_LIMIT = 1.1  # times the base model's; preference training that pushes too hard ends in noise


def measure(session: Session) -> HeldOutErrors | None:
    """Accuracy and margin on the held-out pairs; the base model's too, the first time. What was measured, if anything.

    Where the guard is off, a rising error on chosen images is said here.
    """
    if not session.held_out_indices:
        return None
    batch = session.config.training.train_batch_size
    with main_work(session) as mine:
        if not mine:
            return None
        what = "measuring held-out pairs"
        return spared(session, what, lambda: _measure(session, batch), lambda: _measure(session, 1))


def _measure(session: Session, batch_size: int) -> HeldOutErrors:
    config = session.config

    def run(base: bool) -> HeldOutErrors:
        report = throttled(lambda what, done, total: session.emit("phase", phase=what, done=done, total=total))
        with session.autocast(), weights_in_use(session):
            return held_out_errors(
                session.model,
                session.family,
                session.pairs,
                session.held_out_indices,
                draws=config.validation.draws,
                seed=config.seed,
                batch_size=batch_size,
                base=base,
                progress=lambda done, total: report("measuring held-out pairs", done, total),
            )

    errors = None
    if session.held_out_base is None:
        errors = run(base=True)
        session.held_out_base = errors.summary()
    if session.step > 0 or session.starts_trained or errors is None:
        errors = run(base=False)
    session.held_out = errors.summary()
    session.measured[session.step] = (session.held_out.accuracy, session.held_out.margin)
    session.emit("evaluated", **session.held_out.as_dict(), base=session.held_out_base.as_dict())
    risen = session.held_out.chosen_mse > CHOSEN_ERROR_LIMIT * session.held_out_base.chosen_mse
    if risen and not session.guard.config.enabled:
        session.emit(
            "warning",
            code="chosen_error_rises",
            message=f"The error on held-out chosen images has risen from {session.held_out_base.chosen_mse:.4f} to "
            f"{session.held_out.chosen_mse:.4f}: the LoRA is moving away from them. Stop, and start again with a lower "
            "optimizer.learning_rate or a weaker margin, or switch guard.enabled on.",
        )
    session.emit("phase", phase="training")
    return errors


def draw_samples(session: Session) -> None:
    """A sheet of validation pictures: the base model's above, the LoRA's below, same seeds."""
    with main_work(session) as mine:
        if mine:
            spared(session, "drawing samples", lambda: _draw_samples(session), lambda: _draw_in_tiles(session))


def _draw_in_tiles(session: Session) -> None:
    """The same, decoded in tiles."""
    vae: Any = session.model.vae
    vae.enable_tiling()
    try:
        _draw_samples(session)
    finally:
        vae.disable_tiling()


def _draw_samples(session: Session) -> None:
    config = session.config.validation
    prompts = validation_prompts(session.config, session.source_pairs, session.held_out_indices)
    resolution = session.config.data.resolution or session.model.resolution
    session.emit("phase", phase="drawing samples", done=0, total=len(prompts))
    report = throttled(lambda what, done, total: session.emit("phase", phase=what, done=done, total=total))

    def draw(base: bool) -> list[Image.Image]:
        texts = [*prompts, config.negative_prompt]
        if session.model.trains_text and not base:
            encoded = encode_prompts(session.model, session.family, texts, base=False)
        else:
            encoded = [session.prompts.get(p) for p in texts]
        return sample_images(
            session.model,
            session.family,
            encoded[:-1],
            encoded[-1],
            [config.seed + i for i in range(len(prompts))],
            width=config.width or resolution,
            height=config.height or resolution,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            base=base,
            autocast=session.autocast,
            progress=lambda done, total: report("drawing samples", done, total),
        )

    folder = session.run.samples
    base = base_pictures(session, folder / "base", prompts, draw)
    rows, titles = [base], ["base"]
    if session.step > 0 or session.starts_trained:
        with weights_in_use(session):
            pictures = draw(base=False)
        rows.append(pictures)
        titles.append(f"step {session.step}")
        save_pictures(pictures, folder / f"step_{session.step:08d}")
    sheet = folder / f"step_{session.step:08d}.png"
    save_image(contact_sheet(rows, titles, prompts), sheet)
    session.emit("sample_saved", path=str(sheet.relative_to(session.run.path)), prompts=prompts, **_base(session))
    session.emit("phase", phase="training")


def _base(session: Session) -> dict[str, str]:
    """That the pictures show a base in fewer bits, where they do; those drawn after training show the full one."""
    precision = session.plan.base_precision
    return {} if precision == "full" else {"base_precision": precision}


def base_pictures(
    session: Session, folder: Path, prompts: list[str], draw: Callable[[bool], list[Image.Image]]
) -> list[Image.Image]:
    """The base model's pictures, drawn once per run."""
    paths = [folder / f"{i:02d}.png" for i in range(len(prompts))]
    if all(p.exists() for p in paths):
        return [Image.open(p).convert("RGB") for p in paths]
    pictures = draw(True)
    save_pictures(pictures, folder)
    return pictures


def save_state(session: Session, replace: bool = False) -> None:
    """A checkpoint of this step, from the main process; drops those that are no longer kept."""
    if not session.accelerator.is_main_process:
        return
    path = checkpoints.save_checkpoint(session.run, take_with_good(session), replace)
    checkpoints.drop_old(session.run, session.config.checkpoint, session.measured)
    session.emit("checkpoint_saved", path=str(path.relative_to(session.run.path)))


def export(session: Session, name: str) -> str:
    """Write the LoRA file and prove that it holds what was trained; its path inside the run folder."""
    config = session.config
    session.run.export.mkdir(exist_ok=True)
    with weights_in_use(session):
        report = export_lora(
            session.model,
            session.family,
            session.run.export / f"{name}.safetensors",
            layout=config.export.layout,
            precision=config.export.precision,
            rank=config.export.rank,
            metadata=run_metadata(
                session.run, config, session.model, session.family, session.step, session.progress_state()
            ),
        )
    for path in export_tokens(session.model, report.path):
        words = f"The new word is in {path.name}: ComfyUI loads it as embedding:{path.stem}."
        session.emit("phase", phase="writing the LoRA", embedding=path.name, message=words)
    if report.kept_norm < 1:
        left = f"Written at rank {config.export.rank}, {report.kept_norm:.1%} of the LoRA's norm is left."
        session.emit("phase", phase="writing the LoRA", kept_norm=report.kept_norm, message=left)
    return str(report.path.relative_to(session.run.path))
