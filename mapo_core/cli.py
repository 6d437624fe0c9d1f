"""The command line. Every command is a thin face over the same functions that the other faces call."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import runpy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, MapoError, PairsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .config import TrainConfig
    from .pairs import LintReport, PreferencePair, RowFilter
    from .runs import Lifetime, RunDir

SLOW_CHECK = 1000  # pairs from which on a check shows how far it is
TRAINING = {"train", "sweep"}
TAKE_SETTINGS = {"train", "pairs", "lint", "mismatch", "sweep", "continue", "preflight"}
EPILOG = "Runs and caches are kept in $MAPO_HOME (default: the user's data folder)."


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 0 when it did what it says."""
    from .families._quiet import quiet_import_notices

    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["job"]:  # the child side of runs.run_job, not for people
        from .jobs import job_child

        quiet_import_notices()
        return job_child(words[1])
    if words[:1] == ["ui"]:  # a face, which has its own options
        return page(words[1:])
    rest, settings = split_settings(words)
    known = build_parser().parse_args(rest)
    known.settings, known.findings = settings, ()
    if settings and known.command not in TAKE_SETTINGS:
        print(f"Error: mapo {known.command} takes no settings such as --{settings[0][0]}.", file=sys.stderr)
        return 1
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    quiet_import_notices()
    from .families._quiet import quiet_import_notices

    quiet_import_notices()
    try:
        return known.action(known)
    except MapoError as error:
        print(f"Error: {error}", file=sys.stderr)
        if isinstance(error, PairsError):
            for problem in error.problems[:20]:
                print(f"  {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nInterrupted. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        return 130


# --- commands --------------------------------------------------------------------------------------------------------


def demo(args: argparse.Namespace) -> int:
    """The main job on the built-in model."""
    from .demo.run import run_demo

    return run_demo(steps=args.steps, style=args.style, seed=args.seed, method=args.method)


def train(args: argparse.Namespace) -> int:
    """Train on the user's images, or be the child process of a run folder."""
    if args.run is not None:
        from .child import run_child
        from .runs import open_run

        return run_child(open_run(args.run), args.lifetime)
    from .pairs import pair_lines, require_scores
    from .runs import create_run

    values = settings_of(args)
    if args.name is None and "name" not in values:
        raise ConfigError("Name the run, for example: --name my-style. The LoRA file gets the same name.")
    if args.name is not None:
        values["name"] = args.name
    config, pairs = config_and_pairs(values, args)
    if "chosen_score" in config.method.build("sdxl").needs:
        require_scores(pairs, config.method.type)
    report = lint_set(pairs, config, extra=args.findings)
    print(report.render())
    if report.errors:
        print("Nothing was trained. Correct the errors above and run the same command again.", file=sys.stderr)
        return 1
    run = create_run(config.name, config.to_json(), pair_lines(pairs))
    print(f"Run folder: {run.path}")
    return train_and_show(run, args.lifetime)


def pairs(args: argparse.Namespace) -> int:
    """Build a pair set and write it."""
    from .pairs import write_pairs

    values = settings_of(args)
    values.setdefault("name", "pairs")
    _, found = config_and_pairs(values, args)
    out = Path(args.out)
    if out.exists() and not args.overwrite:
        raise PairsError(f"{out} exists. Give another --out, or --overwrite to replace it.")
    write_pairs(out, found)
    sources: dict[str, int] = {}
    for pair in found:
        sources[pair.source.split(",")[0]] = sources.get(pair.source.split(",")[0], 0) + 1
    print(f"{len(found)} pairs in {out}")
    for source, count in sorted(sources.items(), key=lambda s: -s[1])[:8]:
        print(f"  {count:5d}  {source}")
    return 0


def lint(args: argparse.Namespace) -> int:
    """Check a pair set; exit code 1 if it has errors."""
    values = settings_of(args)
    values.setdefault("name", "lint")
    config, found = config_and_pairs(values, args, generate=False)
    report = lint_set(found, config, with_model=args.model is not None, extra=args.findings, check_all=args.all)
    if args.json:
        Path(args.json).write_text(report.to_json(), encoding="utf-8")
    print(report.render())
    return 1 if report.errors else 0


def runs(args: argparse.Namespace) -> int:
    """List the runs."""
    from .console import duration
    from .runs import list_runs, mapo_home, run_status

    found = list_runs()
    if not found:
        print(f"There is no run in {mapo_home() / 'runs'} yet. Start one with: mapo demo, or mapo train --help")
        return 0
    print(f"{'run':<32} {'state':<12} {'step':>13}  {'left':>12}  LoRA")
    for run in found:
        status = run_status(run)
        left = status.metrics.get("seconds_left") if status.alive else None
        lora = run.export / f"{run.name}.safetensors"
        steps = f"{status.step}/{status.steps}" if status.steps else str(status.step)
        print(
            f"{run.name:<32} {status.state:<12} {steps:>13}  {duration(left) if left else '':>12}  "
            f"{lora if lora.exists() else ''}"
        )
    return 0


def stop(args: argparse.Namespace) -> int:
    """Ask a run to stop and keep its work."""
    from .runs import open_run, stop_run

    print(stop_run(open_run(args.run)))
    return 0


def resume(args: argparse.Namespace) -> int:
    """Go on where a run was stopped or interrupted."""
    from .runs import open_run, run_status

    run = open_run(args.run)
    status = run_status(run)
    if status.alive and status.state == "paused":
        run.request("resume")
        print(f"Run {run.name} goes on.")
        return 0
    if status.state == "finished":
        print(f"Run {run.name} is finished; its LoRA is {run.export}. To train longer, start a new run.")
        return 0
    return train_and_show(run, args.lifetime)


def export(args: argparse.Namespace) -> int:
    """Write a run's LoRA again: another checkpoint, layout, precision or rank."""
    from .lora_file import read_lora
    from .reopen import export_run
    from .runs import open_run

    path = export_run(
        open_run(args.run), step=args.step, layout=args.layout, precision=args.precision, out=args.out, rank=args.rank
    )
    print(path)
    kept = read_lora(path).metadata.get("mapo.kept_norm")
    if kept is not None:
        print(f"At the smaller rank {float(kept):.1%} of the update's norm is left.")
    return 0


def compare(args: argparse.Namespace) -> int:
    """A sheet of the base model's pictures beside the LoRA's."""
    from .reopen import compare_run
    from .runs import open_run

    path = compare_run(
        open_run(args.run),
        steps=args.step or [None],
        prompts=args.prompt or None,
        seed=args.seed,
        strengths=args.strength,
    )
    print(path)
    return 0


def page(words: list[str]) -> int:
    """The trainer in a browser: a face, started by its path, because the core imports none."""
    entry = Path(__file__).resolve().parent.parent / "web" / "gradio_app" / "__main__.py"
    if not entry.exists():
        print(f"Error: the page is not installed here ({entry}). Use a clone of the repository.", file=sys.stderr)
        return 1
    if importlib.util.find_spec("gradio") is None:
        print("Error: the page needs gradio. Start it with ./mapo ui, or: pip install 'gradio>=6'", file=sys.stderr)
        return 1
    sys.argv[1:] = words
    runpy.run_path(str(entry), run_name="__main__")
    return 0


# --- shared ----------------------------------------------------------------------------------------------------------


def split_settings(arguments: list[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Take the `--section.field value` and `--section.field=value` out of the arguments."""
    rest: list[str] = []
    settings: list[tuple[str, str | None]] = []
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, equals, text = word.partition("=")
        if not name.startswith("--") or "." not in name:
            rest.append(word)
        elif equals:
            settings.append((name[2:], text))
        else:
            settings.append((name[2:], waiting.pop(0) if waiting else None))
    return rest, settings


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of --config, then of --section.field, unchecked."""
    from .config import load_settings, set_value

    values = load_settings(Path(args.config)) if args.config else {}
    for name, text in args.settings:
        if text is None:
            raise ConfigError(f"--{name} needs a value.")
        set_value(values, name, text)
    if isinstance(method := values.get("method"), dict):
        method.setdefault("type", "mapo")  # as where no method is named at all
    if args.seed is not None:
        values["seed"] = args.seed
    return values


def config_and_pairs(
    values: dict[str, Any], args: argparse.Namespace, generate: bool = True
) -> tuple[TrainConfig, Sequence[PreferencePair]]:
    """Check the settings, then read or build the pairs; rejected images are generated where none are given."""
    from .config import build_config
    from .families import detect
    from .pairs import RowFilter, pairs_from_folders, prompts_from_folder, read_pair_source

    model = values.setdefault("model", {})
    if args.model is not None:
        model["path"] = args.model
    data = values.setdefault("data", {})
    source = args.pairs or data.get("pairs")
    data["pairs"] = "pairs.jsonl"  # the run keeps its own copy under this name
    if "path" not in model:
        if args.command in TRAINING or (args.rejected is None and source is None):
            raise ConfigError("Name the model: --model FILE.safetensors, a diffusers folder, a Hub id, or demo.")
        model["path"] = "demo"
    config = build_config(values)
    if args.command in TRAINING or (args.rejected is None and source is None):
        detect(config.model.path, config.model.family)  # a wrong model is said before any image is read
    words = {"prompt": args.prompt, "trigger": args.trigger or config.export.trigger, "prefix": args.prefix}
    keep = row_filter(args)
    if args.chosen is not None and keep != RowFilter():
        raise ConfigError("--min-label-margin, --min-side and --limit are for parquet: give --pairs FILE.parquet.")
    if args.chosen is None:
        if source is None:
            raise ConfigError("Give the images: --chosen DIR --rejected DIR, or --chosen DIR alone, or --pairs FILE.")
        return config, read_pair_source(source, keep)
    if args.rejected is not None:
        found = pairs_from_folders(Path(args.chosen), Path(args.rejected), match=args.match, seed=config.seed, **words)
        args.findings = found.findings
        return config, list(found.pairs)
    chosen = prompts_from_folder(Path(args.chosen), **words)
    if not generate:
        raise ConfigError("mapo lint needs both sides: give --rejected DIR, or build the set first with mapo pairs.")
    return config, generated_pairs(config, chosen, Path(args.chosen), args)


def row_filter(args: argparse.Namespace) -> RowFilter:
    """Which rows of a parquet file are wanted."""
    from .pairs import RowFilter

    return RowFilter(args.min_label_margin, args.min_side, args.limit)


def generated_pairs(
    config: TrainConfig, chosen: list[Any], folder: Path, args: argparse.Namespace
) -> Sequence[PreferencePair]:
    """Rejected images from the base model; where training follows, in a process that gives its memory back."""
    from .console import ProgressLine
    from .pairs import GenerationSettings, generate_rejected, open_pairs, rejected_folder

    kept = rejected_folder(folder)
    if args.command in TRAINING:
        listing = kept / "pairs.jsonl"
        entry = Path(__file__).resolve().parent / "__main__.py"
        words = [w for n in ("prompt", "trigger", "prefix") if getattr(args, n) for w in (f"--{n}", getattr(args, n))]
        settings = ["--config", args.config] if args.config else []
        settings += [f"--{name}={text}" for name, text in args.settings]
        settings += ["--seed", str(config.seed)]
        command = [sys.executable, str(entry), "pairs", "--chosen", str(folder), "--model", config.model.path]
        done = subprocess.run([*command, "--out", str(listing), "--overwrite", *words, *settings], check=False)
        if done.returncode:
            raise PairsError("The rejected images could not all be generated; the same command goes on from there.")
        return open_pairs(listing)
    line = ProgressLine()
    line.line(f"Rejected images from the base model, kept in {kept}")
    return generate_rejected(
        config,
        chosen,
        kept,
        GenerationSettings(
            num_inference_steps=config.validation.num_inference_steps,
            guidance_scale=config.validation.guidance_scale,
            seed=config.seed,
        ),
        progress=lambda done, total: line.show(f"generating rejected images {done}/{total}", final=done == total),
    ).pairs


def lint_set(
    found: Sequence[PreferencePair],
    config: TrainConfig,
    with_model: bool = True,
    extra: Any = (),
    check_all: bool = False,
) -> LintReport:
    """The linter with the model's resolution and tokenizer; of a large set it shows how far it is."""
    from .console import counted
    from .families import FAMILIES, count_tokens, detect, load_tokenizers
    from .pairs import lint_pairs

    count, window, native = None, 77, 1024
    if with_model:
        what = detect(config.model.path, config.model.family)
        tokenizers = load_tokenizers(what)
        count, window = (lambda prompt: count_tokens(tokenizers, prompt) + 2), tokenizers[0].model_max_length
        native = 64 if config.model.path == "demo" else FAMILIES[what.family].resolution
    resolution = config.data.resolution or native
    return lint_pairs(
        found,
        resolution=resolution,
        bucket=config.data.bucket,
        bucket_step=config.data.bucket_step or max(8, min(64, resolution // 8 // 8 * 8)),
        max_aspect=config.data.max_aspect,
        count_tokens=count,
        token_window=window,
        found=extra,
        progress=counted("checking the images") if len(found) > SLOW_CHECK else None,
        check_all=check_all,
    )


def train_and_show(run: RunDir, lifetime: Lifetime) -> int:
    """Start the child of a run and show it; a detached one is left alone."""
    from .console import start_and_follow
    from .runs import start_run

    if lifetime == "detached":
        handle = start_run(run, lifetime)
        print(f"Training in the background as process {handle.pid}. See: mapo runs; end it with: mapo stop {run.name}")
        return 0
    code = start_and_follow(run)
    lora = run.export / f"{run.name}.safetensors"
    if code == 0 and lora.exists():
        print(f"LoRA: {lora}")
    return code


# --- parser ----------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """All commands with their help."""
    from .cli_cache import add_cache
    from .cli_inspect import add_inspection
    from .cli_measures import add_measures
    from .cli_pairs import add_pair_makers
    from .cli_queue import add_queue
    from .methods import METHODS

    parser = argparse.ArgumentParser(
        prog="mapo", description="Train LoRAs for text-to-image models from chosen and rejected images.", epilog=EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, action: Any, help_: str, example: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help_,
            description=help_,
            epilog=f"Example:\n  {example}\n\n{EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(action=action)
        return sub

    sub = add("demo", demo, "Train a style LoRA on the built-in demo model, in minutes, on any machine.", "mapo demo")
    sub.add_argument("--style", default="cartoon", help="drawing style to teach: cartoon (default), sticker or neon")
    sub.add_argument("--method", default="mapo", choices=list(METHODS), help="default mapo")
    sub.add_argument("--steps", type=int, help="training steps; more take longer and fit closer")
    sub.add_argument("--seed", type=int, default=0)

    sub = add(
        "train",
        train,
        "Train a LoRA on your images. Any setting: --section.field value (docs/settings.md lists them).",
        "mapo train --model sdxl.safetensors --chosen good/ --rejected bad/ --name my-style --training.steps 1000",
    )
    sub.add_argument("run", nargs="?", help=argparse.SUPPRESS)
    add_images(sub)
    sub.add_argument("--name", help="name of the run and of the LoRA file")
    add_lifetime(sub)

    sub = add(
        "pairs",
        pairs,
        "Build a pair set (JSONL) from folders, a manifest or parquet; without --rejected the base model makes them.",
        "mapo pairs --chosen good/ --rejected bad/ --match stem --out pairs.jsonl",
    )
    add_images(sub)
    sub.add_argument("--out", default="pairs.jsonl", help="file to write (default pairs.jsonl)")
    sub.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    add_pair_makers(sub)

    sub = add(
        "lint",
        lint,
        "Check pairs before any GPU time is spent. Nothing is changed; exit code 1 if there are errors.",
        "mapo lint --chosen good/ --rejected bad/ --model sdxl.safetensors",
    )
    add_images(sub)
    sub.add_argument("--json", metavar="FILE", help="write the report as JSON, too")
    sub.add_argument(
        "--all",
        action="store_true",
        help="decode every image of more than 20 000 pairs too; otherwise those of 5000 of them, drawn at random",
    )

    add("runs", runs, "List the runs with state, step, time left and LoRA.", "mapo runs")
    sub = add(
        "stop", stop, "Stop a run after its current step and keep the LoRA; asked again, end it.", "mapo stop my-style"
    )
    sub.add_argument("run", help="name or folder of the run")
    sub = add("resume", resume, "Go on exactly where a run was stopped or interrupted.", "mapo resume my-style")
    sub.add_argument("run", help="name or folder of the run")
    add_lifetime(sub)

    sub = add("export", export, "Write a run's LoRA file again, in another form.", "mapo export my-style --step 500")
    sub.add_argument("run", help="name or folder of the run")
    sub.add_argument("--step", type=int, help="checkpoint to export (default: the newest)")
    sub.add_argument("--layout", choices=["kohya", "diffusers"], help="default: the run's setting, kohya")
    sub.add_argument("--precision", choices=["fp32", "fp16", "bf16"], help="default: the run's setting, fp16")
    sub.add_argument("--out", type=Path, help="file to write (default: in the run's export folder)")
    sub.add_argument("--rank", type=int, help="write it at this rank where it has more (SVD); says what is kept")

    sub = add(
        "compare",
        compare,
        "Draw the same prompts and seeds with the base model and with the LoRA.",
        'mapo compare my-style --prompt "a castle at night" --strength 0.5 1',
    )
    sub.add_argument("run", help="name or folder of the run")
    sub.add_argument("--prompt", action="append", help="may be repeated; default: the run's validation prompts")
    sub.add_argument("--strength", type=float, nargs="+", default=[1.0], help="LoRA strengths, a row each (default 1)")
    sub.add_argument("--step", type=int, nargs="+", help="checkpoints, rows each (default: the newest)")
    sub.add_argument("--seed", type=int, help="seed of the first picture (default: the run's)")

    add_inspection(add)
    add_cache(add)
    add_measures(add)
    add_queue(add)
    add("ui", None, "The trainer in your browser, on this machine: pairs, training, results.", "mapo ui --port 8000")
    return parser


def add_images(sub: argparse.ArgumentParser) -> None:
    """The options that say which images and which model."""
    from .cli_measures import fraction, positive

    sub.add_argument("--model", help=".safetensors file, diffusers folder, Hub id, or demo")
    sub.add_argument("--chosen", help="folder of the images you want more of")
    sub.add_argument("--rejected", help="folder of the images you want less of; without it the base model makes them")
    sub.add_argument(
        "--pairs", help="a pair set instead of folders: JSONL, CSV, parquet, or hf://datasets/OWNER/NAME[/PATTERN]"
    )
    sub.add_argument(
        "--min-label-margin", type=fraction, default=0.0, help="parquet: how clear a label must be, 0-1 (default 0)"
    )
    sub.add_argument("--min-side", type=int, default=0, help="parquet: shorter side of both images, pixels (default 0)")
    sub.add_argument("--limit", type=positive, help="parquet: stop after so many pairs")
    sub.add_argument(
        "--match",
        choices=["stem", "order", "random"],
        default="stem",
        help="pair images by file name without ending (default), by order, or each with a random one of its prompt",
    )
    sub.add_argument("--prompt", help="one prompt for all images that have neither a .txt file nor metadata")
    sub.add_argument("--trigger", default="", help="trigger word, put before every prompt")
    sub.add_argument("--prefix", default="", help="text put before every prompt")
    sub.add_argument("--config", help="settings file, JSON or YAML; --section.field overrides it")
    sub.add_argument("--seed", type=int, help="seed of everything random (default 0)")


def add_lifetime(sub: argparse.ArgumentParser) -> None:
    """Whether the training outlives this terminal."""
    sub.add_argument(
        "--lifetime",
        choices=["tied", "detached"],
        default="tied",
        help="detached: train on in the background when this terminal closes",
    )
