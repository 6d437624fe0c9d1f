"""The pieces of work that faces have done in a process of their own; see `runs.job.run_job` for the other side."""

from __future__ import annotations

import json
import logging
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MapoError
from .runs import nulls_for_nonfinite, open_run, watch_parent

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[str, int, int], None]


def generate_rejected(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Rejected images for a folder of chosen ones.

    Args:
        arguments: `settings` (of TrainConfig, nested), `chosen` (folder), `prompt`, `trigger`, `prefix`, `per_image`,
            `num_inference_steps`, `guidance_scale`, `seed`.
        progress: of the work.

    Returns:
        `pairs`: path of the pair set.
    """
    from .config import build_config
    from .pairs import prompts_from_folder, write_pairs
    from .pairs.generate import GenerationSettings, generate_rejected, rejected_folder

    config = build_config(arguments["settings"])
    folder = Path(arguments["chosen"])
    words = {name: arguments[name] for name in ("prompt", "trigger", "prefix")}
    chosen = prompts_from_folder(folder, **words)
    kept = rejected_folder(folder)
    made = generate_rejected(
        config,
        chosen,
        kept,
        GenerationSettings(
            num_inference_steps=arguments["num_inference_steps"],
            guidance_scale=arguments["guidance_scale"],
            seed=arguments["seed"],
            per_image=arguments["per_image"],
        ),
        progress=lambda done, total: progress("generating rejected images", done, total),
    )
    listing = kept / "pairs.jsonl"
    write_pairs(listing, made.pairs)
    return {"pairs": str(listing)}


def caption(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Captions for images that have none.

    Args:
        arguments: `images` (paths), `out` (folder for the caption files, or None: beside the images), and the fields
            of `CaptionSettings`.
        progress: of the work.

    Returns:
        `written`: how many; `failed`: image -> why it has none. The captions are read with `read_captions`.
    """
    from .pairs import CaptionSettings, caption_file, load_captioner, write_caption_files

    images = [Path(path) for path in arguments.pop("images")]
    out = arguments.pop("out", None)
    settings = CaptionSettings(**arguments)
    progress("loading the captioning model", 0, 1)
    made = write_caption_files(
        images,
        load_captioner(settings),
        settings,
        target=lambda image: caption_file(image, Path(out) if out else None),
        progress=lambda done, total: progress("writing captions", done, total),
    )
    return {"written": len(made.written), "failed": {str(path): why for path, why in made.failed.items()}}


def lint(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The check of a pair set.

    Args:
        arguments: `pairs` (path of a pair set), `resolution` (pixels), `check_all` (decode every image of a large
            set too).
        progress: of the work.

    Returns:
        `findings`: level, code, message, pairs and paths of each, errors first.
    """
    from .pairs import lint_pairs, load_pairs

    report = lint_pairs(
        load_pairs(Path(arguments["pairs"])),
        resolution=arguments["resolution"],
        check_all=arguments.get("check_all", False),
        progress=lambda done, total: progress("looking at the images", done, total),
    )
    return json.loads(report.to_json())


def compare(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The sheet of `reopen.compare_run`; arguments: `run` and its keyword arguments.

    Returns:
        `sheet`: its path.
    """
    from .reopen import compare_run

    run = open_run(arguments.pop("run"))
    return {"sheet": str(compare_run(run, progress=lambda d, t: progress("drawing", d, t), **arguments))}


def export(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The LoRA file of a checkpoint; arguments: `run` and the keyword arguments of `reopen.export_run`.

    Returns:
        `lora`: its path.
    """
    from .reopen import export_run

    run = open_run(arguments.pop("run"))
    progress("writing the LoRA", 0, 1)
    out = arguments.pop("out", None)
    return {"lora": str(export_run(run, out=Path(out) if out else None, **arguments))}


def inspect_pairs(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """The per-pair view; arguments: `run` and the keyword arguments of `inspect_pairs.inspect_run`.

    Returns:
        `inspection` (see `continuation.read_inspection`) and `text` for people.
    """
    from .continuation import read_inspection
    from .inspect_pairs import inspect_run

    run = open_run(arguments.pop("run"))
    found = inspect_run(run, progress=progress, **arguments)
    return {"inspection": read_inspection(run, found.steps[-1]), "text": found.render()}


def mismatch(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Reference mismatch of a pair set.

    Args:
        arguments: `settings` (of TrainConfig, nested), `pairs` (path), `count`, `num_inference_steps`,
            `guidance_scale`, `embedder`, `sheet` (path to write).
        progress: of the work.

    Returns:
        `text` for people, `beta` (None where it is not measurable), and the measure itself as `mismatch`.
    """
    from .config import build_config
    from .evaluate import load_embedder, measure_mismatch, mismatch_sheet
    from .pairs import load_pairs
    from .pictures import save_image

    config = build_config(arguments["settings"])
    embedder = load_embedder(arguments["embedder"], config.model.path, device=config.training.device)
    said = _Phases(progress)
    found, pictures = measure_mismatch(
        config,
        load_pairs(Path(arguments["pairs"])),
        embedder,
        count=arguments["count"],
        num_inference_steps=arguments["num_inference_steps"],
        guidance_scale=arguments["guidance_scale"],
        progress=said.progress,
        phase=said.phase,
    )
    save_image(mismatch_sheet(pictures), Path(arguments["sheet"]))
    return {"text": found.render(), "beta": found.beta, "mismatch": found.as_dict()}


def evaluate(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """All measures of a checkpoint; arguments: `run` and the fields of `EvaluationSettings` and of its options.

    Returns:
        `text` for people, `sheet` (path), and the measures themselves as `evaluation`.
    """
    from .evaluate import EvaluationSettings, ScorerOptions, evaluate_run

    run = open_run(arguments.pop("run"))
    given = {name: arguments.pop(name) for name in ("download", "folders", "sha256") if name in arguments}
    given["folders"] = {name: Path(path) for name, path in given.get("folders", {}).items()}
    options = ScorerOptions(**given)
    lists = {name: tuple(arguments.pop(name)) for name in ("scorers", "prompts", "outside") if name in arguments}
    said = _Phases(progress)
    found = evaluate_run(
        run, EvaluationSettings(**lists, **arguments, options=options), progress=said.progress, phase=said.phase
    )
    return {"text": found.render(), "sheet": str(run.path / found.sheet), "evaluation": found.as_dict()}


def scorers(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Which scorers can be used on this machine; nothing is loaded or downloaded.

    Returns:
        `scorers`: `name`, `about`, and `missing`: what it lacks, None where it can be used.
    """
    from .evaluate import SCORERS, describe_scorer, missing_weights

    rows = [{"name": n, "about": describe_scorer(n), "missing": missing_weights(n)} for n in SCORERS]
    return {"scorers": rows}


def sweep(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """A grid of settings, trained and measured; the same call again goes on where it was stopped.

    Args:
        arguments: `settings` (nested), `pairs` (path), `grid` (setting -> values as text), `evaluate` (arguments of
            `evaluate`), `rank_by`.
        progress: of the work.

    Returns:
        `text` for people, and the table as `sweep`.
    """
    from .pairs import load_pairs
    from .sweep import run_sweep

    said = _Phases(progress)
    found = run_sweep(
        arguments["settings"],
        load_pairs(Path(arguments["pairs"])),
        arguments["grid"],
        evaluate=arguments.get("evaluate"),
        rank_by=arguments["rank_by"],
        progress=said.progress,
        phase=said.phase,
    )
    return {"text": found.render(), "sweep": found.as_dict()}


def preflight(arguments: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What a run would need; see `preflight.preflight`.

    Args:
        arguments: `settings` (of TrainConfig, nested; `memory.plan` may be "auto" or a card size such as "8GB") and
            `pairs`, the path of a pair set, or None: then a pair of noise at the settings' resolution stands in.
        progress: of the work.

    Returns:
        `text` for people (a line each for memory, pace, time, disk, savings) and the fields of `preflight.Needs`:
        `plan` (dict), `rungs` (names of savings added to fit), `peak_memory_bytes`, `budget_bytes`, `seconds_per_step`,
        `seconds_total`, `cache_bytes`, `base_error` (None with a full base), `device`, `resolution`, `family`. What
        does not fit whatever is saved is an error whose message says what to change.
    """
    from .config import build_config
    from .pairs import load_pairs
    from .preflight import preflight

    pairs = load_pairs(Path(arguments["pairs"])) if arguments.get("pairs") else ()
    found = preflight(build_config(arguments["settings"]), pairs, progress=lambda what: progress(what, 0, 1))
    return {"text": found.render(), **found.as_dict()}


class _Phases:
    """Joins what is done and how far it is."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phase = ""

    def phase(self, name: str) -> None:
        """What is being done."""
        self._phase = name
        self._progress(name, 0, 1)

    def progress(self, done: int, total: int) -> None:
        """How far it is."""
        self._progress(self._phase, done, total)


JOBS: dict[str, Callable[[dict[str, Any], Progress], dict[str, Any]]] = {
    "caption": caption,
    "compare": compare,
    "evaluate": evaluate,
    "export": export,
    "generate_rejected": generate_rejected,
    "lint": lint,
    "inspect_pairs": inspect_pairs,
    "mismatch": mismatch,
    "scorers": scorers,
    "sweep": sweep,
    "preflight": preflight,
}


def job_child(name: str) -> int:
    """Be the child process of `run_job`: arguments from standard input, JSON lines to standard output."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not come between the answers

    def say(**message: Any) -> None:
        answers.write(json.dumps(nulls_for_nonfinite(message)) + "\n")

    with open(0, "rb", buffering=0, closefd=False) as given:  # unbuffered: the rest of the pipe is watched below
        arguments = json.loads(given.readline())
    watch_parent(lambda: os._exit(75))
    try:
        say(result=JOBS[name](arguments, lambda what, done, total: say(progress=[what, done, total])))
        return 0
    except MapoError as error:
        say(error=str(error), kind=type(error).__name__)
    except Exception as error:
        traceback.print_exc()
        from .child import explain

        say(error=explain(error), kind="MapoError")
    return 1
