"""The command that shows and clears the caches: `mapo cache`."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from .cache_files import DAY_S, describe_cache, list_cache, plan_prune, prune_cache
from .cache_space import gigabytes

if TYPE_CHECKING:
    from collections.abc import Callable

AddCommand = "Callable[[str, Any, str, str], argparse.ArgumentParser]"


def cache(args: argparse.Namespace) -> int:
    """List what the caches hold, or remove what nobody needs."""
    return _prune(args) if args.prune else _list()


def _list() -> int:
    from .runs import mapo_home

    rows = describe_cache(list_cache())
    folder = mapo_home() / "cache"
    if not rows:
        print(f"Nothing is cached in {folder}.")
        return 0
    print(f"{'size':>10}  {'files':>6}  {'kind':<8} {'precision':<9} {'last used':<12} model; runs that need it")
    for row in rows:
        age = (time.time() - row["last_used"]) / DAY_S
        used = "today" if age < 1 else f"{age:.0f} days ago"
        needed = ", ".join(row["runs"][:3]) + (", ..." if len(row["runs"]) > 3 else "") or "none that says so"
        size, precision = gigabytes(row["size"]), row["precision"] or "?"
        model = row["model"] or ("any model" if row["kind"] == "masks" else "unknown (an older version)")
        print(f"{size:>10}  {row['files']:>6}  {row['kind']:<8} {precision:<9} {used:<12} {model}; {needed}")
    print(f"{gigabytes(sum(row['size'] for row in rows)):>10}  in {folder}")
    return 0


def _prune(args: argparse.Namespace) -> int:
    plan = plan_prune(older_than_days=args.older_than, unused=args.unused)
    if plan.unknown:
        print(f"Runs that do not say what they need (they would encode again): {', '.join(plan.unknown[:5])}")
    if plan.in_use:
        print(f"{plan.in_use} files stay because a run that is being trained needs them.")
    if not plan.shards:
        print(f"There is nothing to remove; {plan.kept} files stay.")
    elif not args.yes:
        print(f"{len(plan.shards)} files with {gigabytes(plan.size)} could go, {plan.kept} would stay. Nothing was")
        print("removed: repeat the command with --yes. What a later run misses, it encodes again.")
    else:
        print(f"{gigabytes(prune_cache(plan))} removed, {plan.kept} files stay.")
    return 0


def add_cache(add: Callable[[str, Any, str, str], argparse.ArgumentParser]) -> None:
    """The command's arguments."""
    sub = add(
        "cache",
        cache,
        "Show how much disk encoded images, prompts and masks take, by model; or remove what nobody needs.",
        "mapo cache --prune --unused --yes",
    )
    sub.add_argument("--list", action="store_true", help="show what there is (the default)")
    sub.add_argument("--prune", action="store_true", help="say what could be removed, and remove it with --yes")
    sub.add_argument("--unused", action="store_true", help="prune: what no run folder needs")
    sub.add_argument("--older-than", type=float, metavar="DAYS", help="prune: what was not used for so many days")
    sub.add_argument("--yes", action="store_true", help="prune: remove it")
