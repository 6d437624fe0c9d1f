"""The commands that measure: mismatch, evaluate, sweep."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ConfigError, PairsError
from .evaluate.scorers import SCORERS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .config import TrainConfig
    from .pairs import PreferencePair

AddCommand = "Callable[[str, Any, str, str], argparse.ArgumentParser]"


class Reporter(Protocol):
    """Where a measuring command tells how far it is, and its result."""

    def progress(self, done: int, total: int) -> None:
        """How far it is."""
        ...

    def phase(self, name: str) -> None:
        """What is being done."""
        ...

    def result(self, values: dict[str, Any], text: str) -> None:
        """The end, for programs and for people."""
        ...


class Terminal:
    """Progress in one line, the result as text."""

    def __init__(self) -> None:
        from .console import ProgressLine

        self._line = ProgressLine()
        self._phase = ""

    def progress(self, done: int, total: int) -> None:
        """How far it is."""
        self._line.show(f"{self._phase} {done}/{total}", final=done == total)

    def phase(self, name: str) -> None:
        """What is being done."""
        self._phase = name

    def result(self, values: dict[str, Any], text: str) -> None:
        """The end."""
        self._line.line(text)


def reporting(work: Callable[[argparse.Namespace, Reporter], int]) -> Callable[[argparse.Namespace], int]:
    """A command's action, with a reporter to the terminal."""
    return lambda args: work(args, Terminal())


def write_json(path: Path | None, values: dict[str, Any]) -> None:
    """A result as a file, where one is asked for."""
    from .runs import nulls_for_nonfinite, write_atomic

    if path is not None:
        try:
            write_atomic(path, json.dumps(nulls_for_nonfinite(values), indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(f"Cannot write {path}: {error.strerror}. Check the folder.") from error


# --- commands --------------------------------------------------------------------------------------------------------


def mismatch(args: argparse.Namespace, report: Reporter) -> int:
    """Measure the reference mismatch and suggest a beta."""
    from .evaluate import load_embedder, measure_mismatch, mismatch_sheet
    from .sampling import save_image

    config, pairs = config_and_chosen(args)
    embedder = load_embedder(
        args.embedder,
        config.model.path,
        folder=args.embedder_folder,
        device=config.training.device,
        download=args.download,
    )
    found, pictures = measure_mismatch(
        config,
        pairs,
        embedder,
        count=args.count,
        num_inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
        progress=report.progress,
        phase=report.phase,
    )
    text = found.render()
    if args.sheet is not None:
        save_image(mismatch_sheet(pictures), args.sheet)
        text += f"\nPictures: {args.sheet}"
    write_json(args.json, found.as_dict())
    report.result(found.as_dict(), text)
    return 0


def evaluate(args: argparse.Namespace, report: Reporter) -> int:
    """Measure a run's LoRA."""
    from .evaluate import EvaluationSettings, ScorerOptions, evaluate_run
    from .pairs import read_prompts
    from .runs import open_run

    run = open_run(args.run)
    settings = EvaluationSettings(
        scorers=tuple(args.scorers.split(",")),
        prompts=tuple(read_prompts(args.prompts)) if args.prompts else (),
        outside=tuple(read_prompts(args.outside)) if args.outside else (),
        count=args.count,
        seeds=args.seeds,
        embedder=args.embedder,
        step=args.step,
        options=ScorerOptions(
            download=args.download,
            folders=weight_folders(args),
            sha256=args.sha256,
            judge_endpoint=args.judge_endpoint,
            judge_model=args.judge_model,
        ),
    )
    found = evaluate_run(run, settings, progress=report.progress, phase=report.phase)
    write_json(args.json, found.as_dict())
    folder = run.evaluation / f"step_{found.step:08d}"
    report.result(
        found.as_dict(), f"{found.render()}\nReport: {folder / 'report.json'}\nPictures: {run.path / found.sheet}"
    )
    return 0


def preflight(args: argparse.Namespace, report: Reporter) -> int:
    """Measure what a run would need."""
    from .cli import settings_of
    from .config import build_config
    from .pairs import load_pairs
    from .preflight import preflight

    values = settings_of(args)
    values.setdefault("name", "preflight")
    values.setdefault("data", {}).setdefault("pairs", args.pairs or "none")
    if args.model is not None:
        values.setdefault("model", {})["path"] = args.model
    config = build_config(values)
    found = preflight(config, load_pairs(Path(args.pairs)) if args.pairs else (), progress=report.phase)
    write_json(args.json, found.as_dict())
    report.result(found.as_dict(), found.render())
    return 0


def sweep(args: argparse.Namespace, report: Reporter) -> int:
    """Train and measure a grid of settings, and rank them."""
    from .cli import config_and_pairs, lint_set, settings_of
    from .sweep import grid_points, run_sweep

    grid: dict[str, list[str]] = {}
    for text in args.grid or ():
        setting, _, values = text.partition("=")
        grid[setting] = [v for v in values.split(",") if v]
    points = grid_points(grid)
    settings = settings_of(args)
    if args.name is not None:
        settings["name"] = args.name
    if "name" not in settings:
        raise ConfigError("Name the sweep, for example: --name betas. Its runs are called betas-01, betas-02, ...")
    config, pairs = config_and_pairs(settings, args)
    found = lint_set(pairs, config, extra=args.findings)
    if found.errors:
        raise PairsError(
            "The pairs have errors; nothing was trained. See: mapo lint", [f.message for f in found.errors]
        )
    report.phase(f"{len(points)} trials of {config.training.steps} steps")
    options = {
        "scorers": args.scorers.split(","),
        "count": args.count,
        "seeds": args.seeds,
        "embedder": args.embedder,
        "folders": {name: str(path) for name, path in weight_folders(args).items()},
        "download": args.download,
    }
    result = run_sweep(
        settings,
        pairs,
        grid,
        evaluate=options,
        rank_by=args.rank_by,
        progress=report.progress,
        phase=report.phase,
    )
    write_json(args.json, result.as_dict())
    report.result(result.as_dict(), result.render())
    return 0


def weight_folders(args: argparse.Namespace) -> dict[str, Path]:
    """The `--weights NAME=PATH` of a command."""
    found: dict[str, Path] = {}
    for text in args.weights or ():
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise ConfigError(f"--weights {text}: write NAME=FOLDER, for example --weights dinov2=models/dinov2.")
        found[name] = Path(path).expanduser()
    if getattr(args, "embedder_folder", None) is not None:
        found["dinov2"] = args.embedder_folder
    return found


# --- shared ----------------------------------------------------------------------------------------------------------


def config_and_chosen(args: argparse.Namespace) -> tuple[TrainConfig, Sequence[PreferencePair]]:
    """A run's settings and pairs, or those of the options; without rejected images a chosen one stands for both."""
    from .cli import settings_of
    from .config import build_config, load_config
    from .families import detect
    from .pairs import PreferencePair, load_pairs, prompts_from_folder, read_pair_source
    from .runs import open_run

    if args.run is not None:
        run = open_run(args.run)
        return load_config(run.config), load_pairs(run.pairs)
    values = settings_of(args)
    values.setdefault("name", args.command)
    model, data = values.setdefault("model", {}), values.setdefault("data", {})
    if args.model is not None:
        model["path"] = args.model
    if "path" not in model:
        raise ConfigError("Name the model: --model FILE.safetensors, a diffusers folder, a Hub id, or demo.")
    source = args.pairs or data.get("pairs")
    data["pairs"] = "pairs.jsonl"
    config = build_config(values)
    detect(config.model.path, config.model.family)  # a wrong model is said before any image is read
    if args.chosen is None:
        if source is None:
            raise ConfigError("Give the images: --chosen DIR, or --pairs FILE, or the name of a run.")
        return config, read_pair_source(source)
    words = {"prompt": args.prompt, "trigger": args.trigger or config.export.trigger, "prefix": args.prefix}
    found = prompts_from_folder(Path(args.chosen), **words)
    return config, [PreferencePair(prompt=c.prompt, chosen=c.image, rejected=c.image, source=c.source) for c in found]


# --- parser ----------------------------------------------------------------------------------------------------------


def add_measures(add: Callable[[str, Any, str, str], argparse.ArgumentParser]) -> None:
    """The commands of this file, with their help."""
    sub = add(
        "mismatch",
        reporting(mismatch),
        "Measure how far the chosen images are from what the base model draws, and suggest a first beta (a heuristic).",
        "mapo mismatch --chosen style/ --model sdxl.safetensors",
    )
    sub.add_argument("run", nargs="?", help="name or folder of a run, instead of --model and --chosen or --pairs")
    add_images(sub)
    sub.add_argument("--count", type=positive, default=48, help="prompts to draw, twice each (default 48)")
    sub.add_argument("--sheet", type=Path, help="PNG to write: chosen images above what the base model draws")
    add_embedder(sub)
    add_results(sub)

    sub = add(
        "preflight",
        reporting(preflight),
        "Measure what a training would need: memory, seconds per step, time, disk, and which savings it would use.",
        "mapo preflight --model sdxl.safetensors --pairs p.jsonl --memory.plan 8GB",
    )
    sub.add_argument("--model", help=".safetensors file, diffusers folder, Hub id, or demo")
    sub.add_argument("--pairs", help="a pair set, pairs.jsonl; without one a pair of noise stands in")
    sub.add_argument("--config", help="settings file, JSON or YAML; --section.field overrides it")
    sub.add_argument("--seed", type=int, help="seed of everything random (default 0)")
    add_results(sub)

    sub = add(
        "evaluate",
        reporting(evaluate),
        "Measure a run's LoRA: held-out pairs, win rate over the base model, drift and diversity, with intervals.",
        "mapo evaluate my-style --scorers pickscore,clip --count 64",
    )
    sub.add_argument("run", help="name or folder of the run")
    sub.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    sub.add_argument(
        "--scorers", default="auto", help=f"auto (those whose weights are here), or some of {', '.join(SCORERS)}"
    )
    sub.add_argument("--prompts", type=Path, help="prompts to draw, .txt or .json (default: of the held-out pairs)")
    sub.add_argument("--outside", type=Path, help="prompts for the drift, .txt or .json (default: a built-in list)")
    sub.add_argument("--count", type=positive, default=32, help="at most so many prompts (default 32)")
    sub.add_argument("--seeds", type=positive, default=2, help="pictures per prompt (default 2)")
    sub.add_argument("--weights", action="append", metavar="NAME=PATH", help="where a scorer's weights are")
    sub.add_argument("--sha256", help="hash of a pickled checkpoint that you trust (HPSv2.1)")
    sub.add_argument("--judge-model", help="vlm-judge: folder or Hub id of a vision-language model")
    sub.add_argument("--judge-endpoint", help="vlm-judge: URL of an OpenAI-compatible server; pictures are sent to it")
    add_embedder(sub)
    add_results(sub)

    sub = add(
        "sweep",
        reporting(sweep),
        "Train a small grid of settings for the same number of steps, measure each, and rank them. Resumable.",
        "mapo sweep --model demo --pairs p.jsonl --name rates --grid optimizer.learning_rate=1e-4,1e-3",
    )
    from .cli import add_images as add_all_images

    add_all_images(sub)
    sub.add_argument("--name", help="name of the sweep; its runs get -01, -02, ...")
    sub.add_argument(
        "--grid", action="append", metavar="SETTING=A,B,C", help="what to vary; may be repeated for all combinations"
    )
    sub.add_argument(
        "--rank-by", default="accuracy", help="accuracy (default) or margin on held-out pairs, or one of the scorers"
    )
    sub.add_argument("--scorers", default="auto", help="as of mapo evaluate")
    sub.add_argument("--count", type=positive, default=32, help="at most so many prompts (default 32)")
    sub.add_argument("--seeds", type=positive, default=2, help="pictures per prompt (default 2)")
    sub.add_argument("--weights", action="append", metavar="NAME=PATH", help="where a scorer's weights are")
    add_embedder(sub)
    add_results(sub)


def add_images(sub: argparse.ArgumentParser) -> None:
    """Chosen images with prompts, and the model."""
    sub.add_argument("--model", help=".safetensors file, diffusers folder, Hub id, or demo")
    sub.add_argument("--chosen", help="folder of the images you want more of")
    sub.add_argument(
        "--pairs", help="a pair set instead of a folder: JSONL, CSV, parquet, or hf://datasets/OWNER/NAME[/PATTERN]"
    )
    sub.add_argument("--prompt", help="one prompt for all images that have neither a .txt file nor metadata")
    sub.add_argument("--trigger", default="", help="trigger word, put before every prompt")
    sub.add_argument("--prefix", default="", help="text put before every prompt")
    sub.add_argument("--config", help="settings file, JSON or YAML; --section.field overrides it")
    sub.add_argument("--seed", type=int, help="seed of everything random (default 0)")


def add_embedder(sub: argparse.ArgumentParser) -> None:
    """What measures the likeness of images."""
    sub.add_argument(
        "--embedder",
        choices=["auto", "dinov2", "demo"],
        default="auto",
        help="what measures the likeness of images; auto: dinov2, for the demo model its own classifier",
    )
    sub.add_argument("--embedder-folder", type=Path, help="folder of DINOv2's weights (default: looked for)")
    sub.add_argument("--download", action="store_true", help="download missing weights from the Hub")


def add_results(sub: argparse.ArgumentParser) -> None:
    """Where the result goes."""
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON, too")


def positive(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def fraction(text: str) -> float:
    """A number from 0."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value
