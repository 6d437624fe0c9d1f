"""The commands that look at a run's pairs and go on without some of them: `mapo inspect` and `mapo continue`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable


def inspect(args: argparse.Namespace) -> int:
    """Which pairs a run has learned, which resist, which hurt the held-out ones."""
    from .console import ProgressLine
    from .inspect_pairs import inspect_run
    from .runs import open_run

    run, line = open_run(args.run), ProgressLine()
    found = inspect_run(
        run,
        step=args.step,
        draws=args.draws,
        max_pairs=args.pairs,
        influence_pairs=args.influence,
        progress=lambda what, done, total: line.show(f"{what} {done}/{total}", final=done == total),
    )
    print(found.render(args.show))
    print(f"Pictures and numbers: {run.path / 'inspection'}")
    return 0


def continue_(args: argparse.Namespace) -> int:
    """Go on from a checkpoint without some pairs, or with some turned round, as a new run."""
    from .cli import train_and_show
    from .config import set_value
    from .continuation import continue_run
    from .runs import open_run

    settings: dict[str, Any] = {}
    for name, text in args.settings:
        if text is None:
            raise ConfigError(f"--{name} needs a value.")
        set_value(settings, name, text)
    run = continue_run(
        open_run(args.run),
        exclude=numbers(args.exclude, "--exclude"),
        flip=numbers(args.flip, "--flip"),
        step=args.step,
        name=args.name,
        settings=settings,
    )
    print(f"Run folder: {Path(run.path)}")
    return train_and_show(run, args.lifetime)


def numbers(text: str, option: str) -> list[int]:
    """`3,7` as numbers.

    Raises:
        ConfigError: it is something else.
    """
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ConfigError(f"{option} {text!r}: give pair numbers such as 3,7, as mapo inspect shows them.") from None


def add_inspection(add: Callable[[str, Any, str, str], argparse.ArgumentParser]) -> None:
    """The two commands."""
    from .cli import add_lifetime
    from .cli_measures import positive

    sub = add(
        "inspect",
        inspect,
        "Which pairs a run has learned, which resist, and which hurt the held-out pairs.",
        "mapo inspect my-style",
    )
    sub.add_argument("run")
    sub.add_argument("--step", type=int, help="the last checkpoint to look at (default: the newest)")
    sub.add_argument("--draws", type=positive, default=8, help="fixed timesteps per pair (default 8)")
    sub.add_argument("--pairs", type=positive, default=256, help="at most so many pairs (default 256)")
    sub.add_argument("--influence", type=int, default=48, help="pairs whose influence is estimated (default 48)")
    sub.add_argument("--show", type=positive, default=10, help="pairs to print (default 10)")

    sub = add(
        "continue",
        continue_,
        "Go on from a run's checkpoint as a new run: without some pairs, with some turned round, with other settings.",
        "mapo continue my-style --exclude 3,7 --flip 12 --training.steps 500",
    )
    sub.add_argument("run")
    sub.add_argument("--exclude", default="", help="pairs to leave out, by number: 3,7")
    sub.add_argument("--flip", default="", help="pairs whose images change places")
    sub.add_argument("--step", type=int, help="checkpoint to go on from (default: the newest)")
    sub.add_argument("--name", help="name of the new run (default: the old one's with -next)")
    add_lifetime(sub)
