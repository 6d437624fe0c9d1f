"""The pieces of work that faces have done in a process of their own; see `runs.job.run_job` for the other side."""

from __future__ import annotations

import json
import logging
import os
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MapoError
from .runs import open_run, watch_parent

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


JOBS: dict[str, Callable[[dict[str, Any], Progress], dict[str, Any]]] = {
    "compare": compare,
    "export": export,
    "generate_rejected": generate_rejected,
}


def job_child(name: str) -> int:
    """Be the child process of `run_job`: arguments from standard input, JSON lines to standard output."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not come between the answers

    def say(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")

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
