"""The command `mapo queue`: runs that wait for their turn."""

from __future__ import annotations

import argparse
from typing import Any

from .errors import RunError


def queue(args: argparse.Namespace) -> int:
    """List, add, remove, move, or start what waits."""
    from .runs import (
        add_to_queue,
        move_in_queue,
        open_run,
        queue_entries,
        remove_from_queue,
        run_queue,
    )

    if args.do == "run":
        if not run_queue(say=lambda text: print(text, flush=True)):
            print("The queue is looked after by another process already.")
        return 0
    if args.do == "list":
        entries = queue_entries()
        for place, entry in enumerate(entries, start=1):
            state = entry.problem or ("waiting" if entry.waiting else f"starting as process {entry.pid}")
            print(f"{place:3d}  {entry.run:<32} {state}")
        if not entries:
            print("Nothing waits. Add a run with: mapo queue add RUN")
        return 0
    if not args.run:
        raise RunError(f"Name the run: mapo queue {args.do} RUN")
    if args.do == "add":
        ahead = add_to_queue(open_run(args.run), first=args.first)
        print(f"Run {args.run} is queued" + (f"; before it: {ahead}." if ahead else " and starts now."))
    elif args.do == "remove":
        found = remove_from_queue(args.run)
        print(f"Run {args.run} {'no longer waits' if found else 'was not waiting'}.")
    else:
        move_in_queue(args.run, args.by)
        print(f"Run {args.run} was moved.")
    return 0


def add_queue(add: Any) -> None:
    """Put the command into the parser."""
    sub = add("queue", queue, "Runs that wait for their turn: one at a time per device.", "mapo queue add my-style")
    sub.add_argument("do", choices=["list", "add", "remove", "move", "run"], nargs="?", default="list")
    sub.add_argument("run", nargs="?", help="name of the run")
    sub.add_argument("--first", action="store_true", help="add: before the others")
    sub.add_argument("--by", type=int, default=-1, help="move: places down, or up where negative (default -1)")
