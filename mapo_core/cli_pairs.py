"""The commands that make pairs: `mapo pairs generate-rejected`, `synthesize` and `caption`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from .cli_measures import add_embedder, add_results, fraction, positive, reporting, weight_folders, write_json
from .errors import ConfigError, PairsError
from .evaluate.scorers import SCORERS
from .pairs.captioner import CAPTIONERS, FLORENCE, Detail

if TYPE_CHECKING:
    from .cli_measures import Reporter
    from .config import TrainConfig
    from .pairs import PairSet


def generate_rejected(args: argparse.Namespace, report: Reporter) -> int:
    """Rejected images from the base model for a folder of chosen ones."""
    from .evaluate import load_embedder
    from .pairs import GenerationSettings, prompts_from_folder, rejected_folder
    from .pairs import generate_rejected as generate

    if args.chosen is None:
        raise ConfigError("Give the images: --chosen DIR.")
    refuse_existing(args)
    config = config_of(args)
    words = {"prompt": args.prompt, "trigger": args.trigger or config.export.trigger, "prefix": args.prefix}
    chosen = prompts_from_folder(Path(args.chosen), **words)
    settings = GenerationSettings(
        num_inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
        seed=config.seed,
        per_image=args.per_image,
        min_distance=args.min_distance,
        attempts=args.attempts,
    )
    embedder = None
    if args.min_distance > 0:
        embedder = load_embedder(
            args.embedder,
            config.model.path,
            folder=args.embedder_folder,
            device=config.training.device,
            download=args.download,
        )
    report.phase("generating rejected images")
    folder = args.folder or rejected_folder(Path(args.chosen))
    found = generate(config, chosen, folder, settings, embedder=embedder, progress=report.progress)
    return finish(found, folder, args, report)


def synthesize(args: argparse.Namespace, report: Reporter) -> int:
    """Both images of each pair from the model, by prompt prefixes."""
    from .evaluate import ScorerOptions, choose_scorers, load_scorer
    from .pairs import SynthesisSettings, read_prompts, synthesize_pairs

    refuse_existing(args)
    config = config_of(args)
    prompts = read_prompts(args.prompts)[: args.limit]
    settings = SynthesisSettings(
        chosen_prefix=args.chosen_prefix,
        rejected_prefix=args.rejected_prefix,
        per_prompt=args.per_prompt,
        same_noise=not args.own_noise,
        num_inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
        seed=config.seed,
        min_margin=args.min_margin,
    )
    options = ScorerOptions(
        device=config.training.device,
        download=args.download,
        folders=weight_folders(args),
        sha256=args.sha256,
        judge_endpoint=args.judge_endpoint,
        judge_model=args.judge_model,
    )
    if args.judge is not None:
        choose_scorers([args.judge], config.model.path, options)  # a missing weight is said before anything is drawn
    elif args.min_margin > 0:
        raise ConfigError("--min-margin is the judge's: name one with --judge.")
    folder = args.folder or args.out.with_suffix("")
    found = synthesize_pairs(
        config,
        prompts,
        folder,
        settings,
        load_judge=None if args.judge is None else lambda: load_scorer(args.judge, options),
        judge_name=args.judge or "",
        progress=report.progress,
        phase=report.phase,
    )
    return finish(found, folder, args, report)


def caption(args: argparse.Namespace, report: Reporter) -> int:
    """Captions for the images of a folder that have none."""
    from .pairs import CaptionSettings, list_images, load_captioner, uncaptioned, write_caption_files

    images = list_images(Path(args.folder))
    if not images:
        raise PairsError(f"There are no images in {args.folder}. Check the path.")
    todo = uncaptioned(images)
    settings = CaptionSettings(args.model, args.detail, args.trigger, args.prefix, args.device, args.download)
    written, failed = 0, {}
    if todo:
        report.phase("loading the captioning model")
        captioner = load_captioner(settings)
        report.phase("writing captions")
        made = write_caption_files(todo, captioner, settings, progress=report.progress)
        written, failed = len(made.written), {str(path): why for path, why in made.failed.items()}
    values: dict[str, Any] = {"images": len(images), "written": written, "failed": failed}
    write_json(args.json, values)
    text = f"{written} captions written; {len(images) - len(todo)} of {len(images)} images had a prompt already"
    report.result(values, "\n".join([text, *failed.values()]))
    return 0


# --- shared ----------------------------------------------------------------------------------------------------------


def config_of(args: argparse.Namespace) -> TrainConfig:
    """The settings of the options, with a model that exists."""
    from .cli import settings_of
    from .config import build_config
    from .families import detect

    values = settings_of(args)
    values.setdefault("name", "pairs")
    values.setdefault("data", {})["pairs"] = "pairs.jsonl"
    if args.model is not None:
        values.setdefault("model", {})["path"] = args.model
    if "path" not in values.get("model", {}):
        raise ConfigError("Name the model: --model FILE.safetensors, a diffusers folder, a Hub id, or demo.")
    config = build_config(values)
    detect(config.model.path, config.model.family)
    return config


def refuse_existing(args: argparse.Namespace) -> None:
    """Say that nothing is overwritten before anything is drawn."""
    if args.out.exists() and not args.overwrite:
        raise PairsError(f"{args.out} exists. Give another --out, or --overwrite to replace it.")


def finish(found: PairSet, folder: Path, args: argparse.Namespace, report: Reporter) -> int:
    """Write the pair set and say what it holds."""
    from .pairs import write_pairs

    write_pairs(args.out, found.pairs)
    findings = [finding.message for finding in found.findings]
    values: dict[str, Any] = {
        "pairs": len(found.pairs),
        "out": str(args.out),
        "folder": str(folder),
        "findings": findings,
        "counts": found.counts,
    }
    write_json(args.json, values)
    text = f"{len(found.pairs)} pairs in {args.out}; images in {folder}"
    report.result(values, "\n".join([text, *findings]))
    return 0


# --- parser ----------------------------------------------------------------------------------------------------------


def add_pair_makers(sub: argparse.ArgumentParser) -> None:
    """`generate-rejected` and `synthesize` below `mapo pairs`."""
    commands = sub.add_subparsers(dest="pairs_command", metavar="[generate-rejected | synthesize | caption]")

    def add(name: str, action: Any, help_: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=help_,
            description=help_,
            epilog=f"Example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made.set_defaults(action=reporting(action))
        made.add_argument("--model", help=".safetensors file, diffusers folder, Hub id, or demo")
        made.add_argument("--out", type=Path, default=Path("pairs.jsonl"), help="pair set to write (pairs.jsonl)")
        made.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
        made.add_argument("--config", help="settings file, JSON or YAML; --section.field overrides it")
        made.add_argument("--seed", type=int, help="seed of everything random (default 0)")
        return made

    one = add(
        "generate-rejected",
        generate_rejected,
        "Draw rejected images with the base model: one or more for each chosen image, with its prompt. Resumable.",
        "mapo pairs generate-rejected --model sdxl.safetensors --chosen style/ --per-image 2 --min-distance 0.2",
    )
    one.add_argument("--chosen", help="folder of the images you want more of")
    one.add_argument("--prompt", help="one prompt for all images that have neither a .txt file nor metadata")
    one.add_argument("--trigger", default="", help="trigger word, put before every prompt")
    one.add_argument("--prefix", default="", help="text put before every prompt")
    one.add_argument("--folder", type=Path, help="where images are kept (default: below MAPO_HOME, found again)")
    one.add_argument("--per-image", type=positive, default=1, help="rejected images for each chosen one (default 1)")
    one.add_argument(
        "--min-distance",
        type=fraction,
        default=0.0,
        help="how different a rejected image must be, cosine distance of embeddings (default 0: any); larger is more",
    )
    one.add_argument("--attempts", type=positive, default=4, help="seeds tried until it is (default 4)")
    add_embedder(one)
    add_results(one)

    two = add(
        "synthesize",
        synthesize,
        "Draw both images of each pair: the same prompts with a prefix for chosen and another for rejected. Resumable.",
        'mapo pairs synthesize --model sdxl.safetensors --prompts prompts.txt --chosen-prefix "a cartoon of"',
    )
    two.add_argument("--prompts", type=Path, required=True, help="prompts, .txt (one per line) or .json")
    two.add_argument("--limit", type=positive, help="take the first so many prompts")
    two.add_argument(
        "--chosen-prefix", default="", help='text before a chosen image\'s prompt, or with a place: "{prompt}, cartoon"'
    )
    two.add_argument("--rejected-prefix", default="", help="likewise of a rejected image (default: none)")
    two.add_argument("--per-prompt", type=positive, default=1, help="pairs for each prompt (default 1)")
    two.add_argument("--own-noise", action="store_true", help="draw the two images of a pair from different noise")
    two.add_argument("--folder", type=Path, help="where images are kept (default: beside --out)")
    two.add_argument("--judge", choices=list(SCORERS), help="keep pairs whose chosen image this scorer finds better")
    two.add_argument("--min-margin", type=fraction, default=0.0, help="by how much, in the scorer's unit (default 0)")
    two.add_argument("--weights", action="append", metavar="NAME=PATH", help="where a scorer's weights are")
    two.add_argument("--sha256", help="hash of a pickled checkpoint that you trust (HPSv2.1)")
    two.add_argument("--judge-model", help="vlm-judge: folder or Hub id of a vision-language model")
    two.add_argument("--judge-endpoint", help="vlm-judge: URL of an OpenAI-compatible server; pictures are sent to it")
    two.add_argument("--download", action="store_true", help="download missing weights from the Hub")
    add_results(two)

    three = commands.add_parser(
        "caption",
        help="Write a caption for each image that has none, with a local Florence-2 or BLIP model.",
        description="Write a .txt file beside each image that has neither one nor a prompt in its metadata, with a "
        "local Florence-2 or BLIP model. No file is ever written over, so an interrupted call goes on where it was.",
        epilog="Example:\n  mapo pairs caption style/ --trigger mystyle --download",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    three.set_defaults(action=reporting(caption))
    three.add_argument("folder", help="folder of images; its subfolders too")
    three.add_argument("--model", default=FLORENCE, help=f"folder or Hub id: {', '.join(CAPTIONERS)}")
    three.add_argument("--detail", choices=list(get_args(Detail)), default="short", help="how much is said (short)")
    three.add_argument("--trigger", default="", help="trigger word, put before every caption")
    three.add_argument("--prefix", default="", help="text put before every caption")
    three.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    three.add_argument("--download", action="store_true", help="download the model from the Hub if it is missing")
    add_results(three)
