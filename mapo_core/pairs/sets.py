"""Named sets that grow, and what is done with sets: join, split, filter."""

from __future__ import annotations

import hashlib
import io
import random
from typing import TYPE_CHECKING

from ..errors import PairsError
from ..runs import mapo_home, write_atomic
from .pair import PairSet, PreferencePair, read_pairs, write_pairs

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
    found = sorted(folder.glob("*/pairs.jsonl"), key=lambda p: (-p.stat().st_mtime_ns, p.parent.name))
    return {p.parent.name: p.read_bytes().count(b"\n") for p in found}


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
    known = read_pairs(listing) if listing.exists() else []
    seen = {(p.prompt, p.chosen.name, p.rejected.name) for p in known}
    pairs = list(known)
    try:
        for good, bad, prompt in zip(chosen, rejected, words * (len(chosen) if len(words) == 1 else 1), strict=True):
            files = _keep(good, folder / "chosen"), _keep(bad, folder / "rejected")
            if (prompt, files[0].name, files[1].name) not in seen:
                seen.add((prompt, files[0].name, files[1].name))
                pairs.append(PreferencePair(prompt=prompt, chosen=files[0], rejected=files[1], source=f"set {name}"))
    except OSError as error:
        raise PairsError(f"Cannot write into {folder}: {error.strerror}. Check its disk.") from error
    write_pairs(listing, pairs)
    return PairSet(pairs), len(pairs) - len(known)


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
    pairs: dict[tuple[str, Path, Path], PreferencePair] = {}
    counts: dict[str, int] = {}
    for one in sets:
        for pair in one.pairs:
            pairs.setdefault((pair.prompt, pair.chosen, pair.rejected), pair)
        for name, number in one.counts.items():
            counts[name] = counts.get(name, 0) + number
    return PairSet(list(pairs.values()), counts=counts)


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
    images = list(dict.fromkeys(str(p.chosen) for p in pairs.pairs))
    if len(images) < 2:
        raise PairsError("A set of one chosen image cannot be split. Add pairs, or use the set as it is.")
    count = min(len(images) - 1, max(1, round(share * len(images))))
    held = set(random.Random(seed).sample(images, count))
    return (
        PairSet([p for p in pairs.pairs if str(p.chosen) not in held]),
        PairSet([p for p in pairs.pairs if str(p.chosen) in held]),
    )


def filter_set(pairs: PairSet, findings: Sequence[Finding], codes: Collection[str]) -> tuple[PairSet, PairSet]:
    """Drop the pairs that a finding of the given kinds names; of repeated and duplicate ones the first is kept.

    Args:
        pairs: the set.
        findings: of a check of this very set.
        codes: kinds of findings, keys of `findings.TITLES`.

    Returns:
        What is kept, and what is dropped.
    """
    dropped: set[int] = set()
    for finding in findings:
        if finding.code in codes:
            dropped.update(finding.pairs[1:] if finding.code in KEEP_FIRST else finding.pairs)
    kept = [p for n, p in enumerate(pairs.pairs, start=1) if n not in dropped]
    return PairSet(kept), PairSet([p for n, p in enumerate(pairs.pairs, start=1) if n in dropped])


KEEP_FIRST = frozenset({"exact-duplicate", "near-duplicate", "repeated-pair"})
