"""The main job on the built-in model: two folders of pictures, pairs, a style LoRA, and what it has learned."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .scenes import STYLES, evaluation_scenes, render, scenes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from PIL import Image

    from ..config import TrainConfig
    from ..pairs import PairSet
    from ..reopen import TrainedModel
    from ..runs import RunDir
    from .scenes import Scene

PAIRS = 160
CAPTIONS = 100  # held-out captions that the LoRA is measured on
SAMPLING = {"num_inference_steps": 16, "guidance_scale": 4.0}
EVALUATION_SEED = 2024  # of the captions; the demo model's own evaluation uses others

# Tuned by benchmarks/demo_methods.py, which also says what each method reaches: docs/benchmarks.md.
LEARNING_RATES = {
    "mapo": 3e-3,
    "sft": 3e-3,
    "diffusion_dpo": 1e-3,
    "dco": 3e-3,
    "dreambooth": 3e-3,
    "inpo": 3e-4,
    "smpo": 3e-4,
}
METHOD_SETTINGS = {"dreambooth": {"class_prompt": "a star, white background", "class_images": 24}}
STEPS = 400


@dataclass(frozen=True)
class Fidelity:
    """What a model draws for the held-out captions, means over pictures, 0-1.

    Attributes:
        style: probability of the taught style.
        objects: share of pictures whose objects are all as the caption says.
        colours: likewise for colours.
    """

    style: float
    objects: float
    colours: float


def write_pictures(folder: Path, style: str, count: int = PAIRS, seed: int = 0) -> tuple[Path, Path]:
    """Draw `count` scenes twice, in `style` and plainly, each with its caption in a .txt file.

    Returns:
        The chosen and the rejected folder.
    """
    from ..pictures import save_image
    from ..runs import write_atomic

    chosen, rejected = folder / "chosen", folder / "rejected"
    for path in (chosen, rejected):
        path.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(itertools.islice(scenes(1000 + seed, held_out=False), count)):
        name = f"{i:04d}-{scene.things[0].name}"
        for path, drawn in ((chosen / f"{name}.png", style), (rejected / f"{name}.png", "plain")):
            if not path.exists():  # another demo may be reading the same pictures
                save_image(render(scene, drawn), path)
        write_atomic(chosen / f"{name}.txt", scene.caption + "\n")
    return chosen, rejected


def demo_values(name: str, method: str = "mapo", steps: int | None = None, seed: int = 0) -> dict[str, Any]:
    """The demo's settings: what a small model needs, unlike SDXL (larger steps, more of them)."""
    return {
        "name": name,
        "seed": seed,
        "model": {"path": "demo"},
        "data": {"pairs": "pairs.jsonl", "held_out": 0.15},
        "method": {"type": method, **METHOD_SETTINGS.get(method, {})},
        "adapter": {"rank": 16, "targets": ["attention", "feed_forward", "conv"]},
        "optimizer": {
            "learning_rate": LEARNING_RATES[method],
            "warmup_steps": min(10, (steps or STEPS) // 2),
            "schedule": "cosine",
        },
        "training": {
            "steps": steps or STEPS,
            "train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
        },
        "validation": {"every_steps": 100, "draws": 8, "sample_every_steps": 0, **SAMPLING},
        "checkpoint": {"every_steps": 200},
    }


def demo_pairs(style: str, seed: int = 0, home: Path | None = None) -> PairSet:
    """The demo's pictures, kept in the home folder, as pairs: `style` chosen, the plain style rejected."""
    from ..pairs import pairs_from_folders
    from ..runs import mapo_home

    found = pairs_from_folders(*write_pictures((home or mapo_home()) / "demo" / f"{style}-{seed}", style, seed=seed))
    scores = {"chosen_score": 1.0, "rejected_score": 0.0}  # for SmPO
    return replace(found, pairs=[pair.model_copy(update=scores) for pair in found.pairs])


def create_demo_run(config: TrainConfig, style: str, home: Path | None = None) -> RunDir:
    """Pictures, pairs and a run folder; the linter's errors stop it."""
    from ..pairs import pairs_text
    from ..runs import create_run

    found = demo_pairs(style, config.seed, home)
    return create_run(config.name, config.to_json(), pairs_text(found.pairs), home)


def draw_captions(
    trained: TrainedModel,
    captions: Sequence[Scene],
    *,
    base: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Image.Image]:
    """One picture per caption; the same noise for base and LoRA."""
    from ..adapter import encode_prompts
    from ..sampling import sample_images

    texts = [*(s.caption for s in captions), ""]
    encoded = encode_prompts(trained.model, trained.family, texts, base=base)
    return sample_images(
        trained.model,
        trained.family,
        encoded[:-1],
        encoded[-1],
        [EVALUATION_SEED + i for i in range(len(captions))],
        width=64,
        height=64,
        base=base,
        progress=progress,
        **SAMPLING,  # pyright: ignore[reportArgumentType]
    )


def fidelity(images: Sequence[Image.Image], captions: Sequence[Scene], style: str) -> Fidelity:
    """Judge pictures with the shipped classifier."""
    from .classifier import score_pictures

    scores = score_pictures(images, captions)
    return Fidelity(float(scores.style(style).mean()), float(scores.objects.mean()), float(scores.colours.mean()))


def run_demo(style: str = "cartoon", method: str = "mapo", steps: int | None = None, seed: int = 0) -> int:
    """The whole demo, on the terminal; returns the exit code."""
    from ..cli import lint_set
    from ..config import build_config
    from ..console import ProgressLine, duration, start_and_follow
    from ..pairs import read_pairs

    if style not in STYLES[1:]:
        raise ConfigError(f"There is no style {style!r}: use {', '.join(STYLES[1:])}.")
    started = time.monotonic()
    config = build_config(demo_values(f"demo-{style}", method, steps, seed))
    run = create_demo_run(config, style)
    pairs = read_pairs(run.pairs)
    folder = pairs[0].chosen.parent.parent
    print(f"Wrote {len(pairs)} pictures in {style} style and as many in the plain style: {folder}")
    report = lint_set(pairs, config)
    print(report.render())
    print(f"Run folder: {run.path}")
    code = start_and_follow(run)
    lora = run.export / f"{run.name}.safetensors"
    if code or not lora.exists():
        return code or 1
    line = ProgressLine()
    before, after, sheet = measure_demo(run, style, line)
    line.line("")
    for text in result_table(run, before, after, style):
        line.line(text)
    line.line(f"\nLoRA:         {lora}")
    line.line(f"Before/after: {sheet}")
    line.line(f"Done in {duration(time.monotonic() - started)}.")
    return 0


def measure_demo(run: RunDir, style: str, line: Any = None) -> tuple[Fidelity, Fidelity, Path]:
    """Fidelity of base and LoRA on the held-out captions, and the before/after picture."""
    from ..reopen import open_trained
    from ..sampling import contact_sheet, save_image

    trained = open_trained(run)
    captions = evaluation_scenes(CAPTIONS, EVALUATION_SEED)

    def report(what: str) -> Callable[[int, int], None]:
        return lambda done, total: line.show(f"drawing with the {what} {done}/{total}") if line else None

    base = draw_captions(trained, captions, base=True, progress=report("base model"))
    lora = draw_captions(trained, captions, base=False, progress=report("LoRA"))
    shown = [*range(0, 5), *range(CAPTIONS - 5, CAPTIONS)]  # one-object captions first, two-object ones last
    sheet = run.samples / "before_after.png"
    rows = [[base[i] for i in shown], [lora[i] for i in shown]]
    save_image(contact_sheet(rows, ["base model", "with LoRA"], [captions[i].caption for i in shown], 192), sheet)
    return fidelity(base, captions, style), fidelity(lora, captions, style), sheet


def result_table(run: RunDir, before: Fidelity, after: Fidelity, style: str) -> list[str]:
    """The figures that say whether it worked, as lines."""
    from ..runs import read_events

    end = next(e for e in reversed(read_events(run.events)) if e["type"] in {"run_finished", "run_stopped"})
    rows = [
        (f"{style} style score", before.style, after.style),
        ("objects as the caption says", before.objects, after.objects),
        ("colours as the caption says", before.colours, after.colours),
    ]
    if end.get("held_out") and end.get("held_out_base"):
        rows.insert(0, ("held-out pair accuracy", end["held_out_base"]["accuracy"], end["held_out"]["accuracy"]))
    lines = [f"{'':<30} {'before':>8} {'after':>8}"]
    return lines + [f"{name:<30} {b:>8.2f} {a:>8.2f}" for name, b, a in rows]
