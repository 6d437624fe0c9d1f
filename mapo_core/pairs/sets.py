"""Named sets that grow, and what is done with sets: join, split, filter."""

from __future__ import annotations

import hashlib
import io
import random
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from ..errors import PairsError
from ..runs import mapo_home, write_atomic
from .findings import KEEP_FIRST
from .pair import PairSet, PreferencePair, write_pairs
from .pair_list import load_pairs
from .views import picked, text_hashes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    from PIL import Image

    from .findings import Finding


def set_folder(name: str) -> Path:
    """Where a named set is kept.

    Raises:
        PairsError: the name cannot be a folder's.
    """
    from ..config import checked_name

    try:
        return mapo_home() / "sets" / checked_name(name)
    except ValueError as error:
        raise PairsError(f"Name of the set: {error}.") from None


def list_sets(home: Path | None = None) -> dict[str, int]:
    """Names of the named sets and how many pairs each has, the newest first."""
    folder = (home or mapo_home()) / "sets"
    found = [(p, p.stat()) for p in folder.glob("*/pairs.jsonl")]
    found.sort(key=lambda f: (-f[1].st_mtime_ns, f[0].parent.name))
    return {path.parent.name: _lines_in(path, state.st_size, state.st_mtime_ns) for path, state in found}


@lru_cache(256)
def _lines_in(path: Path, size: int, changed: int) -> int:
    """How many lines a file of this size and time has; a long one is not held in memory, nor counted twice."""
    with path.open("rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(2**20), b""))


def add_to_set(
    name: str, chosen: Sequence[Image.Image], rejected: Sequence[Image.Image], prompts: Sequence[str]
) -> tuple[PairSet, int]:
    """Add pairs of pictures to a named set; one that is in it already, by picture and prompt, is not added again.

    Args:
        name: of the set; a new name begins a new one.
        chosen, rejected: as many pictures each, in the same order.
        prompts: one for all, or one for each pair; lines of white space do not count.

    Returns:
        The whole set, and how many pairs were new.

    Raises:
        PairsError: the numbers do not fit, there is no prompt, or the set cannot be written.
    """
    words = [p.strip() for p in prompts if p.strip()]
    if len(chosen) != len(rejected):
        raise PairsError(
            f"There are {len(chosen)} chosen and {len(rejected)} rejected images. Give as many of one as of the other."
        )
    if len(words) not in (1, len(chosen)):
        raise PairsError(
            f"There are {len(words)} prompts for {len(chosen)} pairs. Give one for all, or a line for each."
        )
    folder = set_folder(name)
    listing = folder / "pairs.jsonl"
    known = load_pairs(listing) if listing.exists() else []
    seen = {hash((p.prompt, p.chosen.name, p.rejected.name)) for p in known}
    new: list[PreferencePair] = []
    try:
        for good, bad, prompt in zip(chosen, rejected, words * (len(chosen) if len(words) == 1 else 1), strict=True):
            files = _keep(good, folder / "chosen"), _keep(bad, folder / "rejected")
            if (key := hash((prompt, files[0].name, files[1].name))) not in seen:
                seen.add(key)
                new.append(PreferencePair(prompt=prompt, chosen=files[0], rejected=files[1], source=f"set {name}"))
    except OSError as error:
        raise PairsError(f"Cannot write into {folder}: {error.strerror}. Check its disk.") from error
    write_pairs(listing, chain(known, new))
    return PairSet(load_pairs(listing)), len(new)


def _keep(picture: Image.Image, folder: Path) -> Path:
    """A PNG named by its pixels, so that the same picture is kept once."""
    rgb = picture.convert("RGB")
    digest = hashlib.sha256(repr(rgb.size).encode() + rgb.tobytes()).hexdigest()[:24]
    path = folder / f"{digest}.png"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        rgb.save(buffer, "PNG")
        write_atomic(path, buffer.getvalue())
    return path


def join_sets(sets: Sequence[PairSet]) -> PairSet:
    """All pairs of several sets, in order; a pair of the same prompt and files is taken once.

    Findings name pairs by number, so they are not carried over: check the joined set again.
    """
    sources = [one.pairs for one in sets]
    names = text_hashes(f"{p.prompt}\0{p.chosen}\0{p.rejected}" for pairs in sources for p in pairs)
    is_first = np.zeros(len(names), bool)
    is_first[np.unique(names, return_index=True)[1]] = True
    counts: dict[str, int] = {}
    for one in sets:
        for name, number in one.counts.items():
            counts[name] = counts.get(name, 0) + number
    return PairSet(picked(sources, is_first), counts=counts)


def split_set(pairs: PairSet, share: float, seed: int = 0) -> tuple[PairSet, PairSet]:
    """Hold out a share of the pairs at random; pairs of one chosen image stay together.

    Args:
        pairs: the set.
        share: of the chosen images to hold out, 0-1; at least one image is on either side.
        seed: of the choice.

    Returns:
        The rest, and what is held out, both in the order of the set.

    Raises:
        PairsError: there are fewer than two different chosen images.
    """
    _, first, inverse = np.unique(
        text_hashes(str(p.chosen) for p in pairs.pairs), return_index=True, return_inverse=True
    )
    if len(first) < 2:
        raise PairsError("A set of one chosen image cannot be split. Add pairs, or use the set as it is.")
    count = min(len(first) - 1, max(1, round(share * len(first))))
    in_order = np.argsort(first)  # the images as they come
    held = np.zeros(len(first), bool)
    held[in_order[random.Random(seed).sample(range(len(first)), count)]] = True
    out = held[inverse.reshape(-1)]
    return PairSet(picked([pairs.pairs], ~out)), PairSet(picked([pairs.pairs], out))


def filter_set(pairs: PairSet, findings: Sequence[Finding], codes: Collection[str]) -> tuple[PairSet, PairSet]:
    """Drop the pairs that a finding of the given kinds names; of repeated and duplicate ones the first is kept.

    Args:
        pairs: the set.
        findings: of a check of this very set.
        codes: kinds of findings, keys of `findings.TITLES`.

    Returns:
        What is kept, and what is dropped.
    """
    dropped = np.zeros(len(pairs.pairs) + 1, bool)
    for finding in findings:
        if finding.code in codes:
            dropped[list(finding.pairs[1:] if finding.code in KEEP_FIRST else finding.pairs)] = True
    return PairSet(picked([pairs.pairs], ~dropped[1:])), PairSet(picked([pairs.pairs], dropped[1:]))
