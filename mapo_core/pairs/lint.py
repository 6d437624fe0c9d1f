"""The check of a set of pairs, before any GPU time is spent on it."""

from __future__ import annotations

import random
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from ..buckets import bucket_sizes, fit, nearest_bucket
from .bias import bias_of
from .captions import FILE_NAME_SOURCE, caption_hint, collapse
from .duplicates import equal_groups, looks_same, near_groups
from .findings import Finding, Findings, LintReport
from .inventory import FAULTS, Inventory
from .pair import IMAGE_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from ..buckets import Fit, Size
    from .pair import PreferencePair

MAX_ENLARGEMENT = 1.5
"""An image that must be enlarged more than this to cover its bucket is far below the training resolution."""
MAX_LOST = 0.2
"""Share of an image's area that its bucket may cut off without a warning."""

MASK_TOLERANCE = 0.02
"""How far the aspect ratios of an image and its mask may differ."""

FULL_PAIRS = 20_000
"""Of sets of at most so many pairs every image is decoded."""
SAMPLE_PAIRS = 5_000
"""So many pairs of a larger set are drawn at random, and theirs are."""
TOLD = 1_000
"""Findings of one kind that are told one by one, in larger sets."""

_STRIDE = 100  # images between two reports of progress, in larger sets


def lint_pairs(
    pairs: Sequence[PreferencePair],
    *,
    resolution: int = 1024,
    bucket: bool = True,
    bucket_step: int = 64,
    max_aspect: float = 2.0,
    count_tokens: Callable[[str], int] | None = None,
    token_window: int = 77,
    found: Sequence[Finding] = (),
    progress: Callable[[int, int], None] | None = None,
    check_all: bool = False,
) -> LintReport:
    """Check pairs; nothing is changed. Errors should stop a run, warnings should be looked at.

    Of more than `FULL_PAIRS` pairs every file's header is read and every file is compared by its bytes, but only the
    images of `SAMPLE_PAIRS` of them, always the same ones, are decoded; what needs decoded images (damage inside a
    file, black masks, shortcuts, pictures that are nearly the same, prompts' tokens) is said of these. The memory is
    some bytes per pair and file.

    Args:
        pairs: as they would be trained.
        resolution, bucket, bucket_step, max_aspect: as in `DataConfig`; resolution and step in pixels.
        count_tokens: tokens of a prompt, with those that begin and end it; None: prompts are not measured.
        token_window: tokens that the text encoder takes at a time.
        found: findings of the reader that made the pairs (`PairSet.findings`), to be part of the report.
        progress: called with (images done, images in all); what it raises ends the check.
        check_all: decode the images of large sets too. Pictures that are nearly the same, captions of another name and
            prompts that are too long are still looked for in the sample.
    """
    sample = _sample(len(pairs))
    large = sample is not None
    closely = np.ones(len(pairs), bool) if check_all or sample is None else sample
    findings = Findings(TOLD if large else None)
    images = Inventory(pairs, findings.told)
    decoded = images.of_pairs(closely)
    scan = large and not check_all
    advance = _advance(progress, int(decoded.sum()) + (len(images) if scan else 0), _STRIDE if large else 1)
    if scan:
        images.scan(pairs, advance)
    images.measure(pairs, decoded, resolution, advance)
    findings.extend(found)
    sizes = bucket_sizes(resolution, bucket_step, max_aspect if bucket else 1.0)
    few = closely if sample is None else sample
    keys = _check_each(pairs, images, closely, sizes, findings)
    if count_tokens is not None:
        _check_lengths(pairs, few, count_tokens, token_window, findings)
    _check_captions(pairs, few, found, findings)
    _check_votes(pairs, keys, findings)
    _check_duplicates(pairs, images, few, findings)
    measured = images.numbers[closely & _decoded(images), :2]
    findings.extend(bias_of(len(measured), lambda trait: images.traits[images.slots[measured], trait]))
    if scan:
        findings.add("note", "sampled", lambda: _sampled(len(pairs), int(closely.sum())), ())
    return LintReport(findings.sorted(), len(pairs), len(images), int(closely.sum()) if scan else None)


def _sample(count: int) -> np.ndarray | None:
    """The pairs of a large set that are looked at closely, bool [N]; None: all."""
    if count <= FULL_PAIRS:
        return None
    drawn = np.zeros(count, bool)
    drawn[random.Random("lint").sample(range(count), min(count, SAMPLE_PAIRS))] = True
    return drawn


def _sampled(count: int, closely: int) -> str:
    return (
        f"Of {count} pairs {closely}, drawn at random but always the same, were decoded. What needs decoded images is "
        "said of these alone: damage inside a file, black masks, shortcuts, pictures that are nearly the same, prompts "
        "that are too long. Of the rest every file's header and size were looked at, and files with the same bytes "
        "were found. To decode all: mapo lint --all."
    )


def _advance(progress: Callable[[int, int], None] | None, total: int, stride: int) -> Callable[[int], None]:
    done = calls = 0

    def advance(by: int) -> None:
        nonlocal done, calls
        done += by
        calls += 1
        if progress and (calls % stride == 0 or done == total):
            progress(done, total)

    return advance


def _decoded(images: Inventory) -> np.ndarray:
    """The pairs of which both images are decoded, bool [N]."""
    return np.all(images.slots[images.numbers[:, :2]] >= 0, axis=1)


def _check_each(
    pairs: Sequence[PreferencePair],
    images: Inventory,
    closely: np.ndarray,
    sizes: tuple[Size, ...],
    findings: Findings,
) -> np.ndarray:
    """What is wrong with single pairs: files, prompt, sizes and masks, and whether both pictures are the same.

    Returns:
        For each pair a hash of prompt and pictures, and that with the pictures' places changed, uint64 [N, 2]; 0 where
        a picture cannot be read.
    """
    keys = np.zeros((len(pairs), 2), np.uint64)
    nearest, fits = lru_cache(4096)(lambda size: nearest_bucket(size, sizes)), lru_cache(4096)(fit)
    known, decoded = images.known, _decoded(images)
    for number, pair in enumerate(pairs, start=1):
        files = images.numbers[number - 1].tolist()
        _check_files(number, pair, files, images, findings)
        if not pair.prompt.strip():
            message = f"Pair {number}: the prompt is empty. Write one, unless the look is meant to need no prompt."
            findings.add("warning", "no-prompt", lambda text=message: text, (number,), (pair.chosen,))
        _check_masks(number, pair, files, images, findings)
        if not (known[files[0]] and known[files[1]]):
            continue
        of_images = [images.size(n) for n in files[:2]]
        _check_sizes(number, pair, of_images, nearest(of_images[0]), fits, findings)
        _check_same(number, pair, files, images, bool(decoded[number - 1] and closely[number - 1]), findings)
        keys[number - 1] = _vote_keys(pair, *images.identity[files[:2]].tolist())
    return keys


def _check_files(number: int, pair: PreferencePair, files: list[int], images: Inventory, findings: Findings) -> None:
    for name, file in zip(IMAGE_FIELDS, files, strict=True):
        if file < 0 or not images.fault[file]:
            continue
        code, path = FAULTS[images.fault[file] - 1], getattr(pair, name)

        def message(name: str = name, file: int = file, code: str = code, path: Path = path) -> str:
            role = name.replace("_", " ") + ("" if name.endswith("mask") else " image")
            if code == "missing-image":
                return f"Pair {number}: {role} is missing: {path}. Fix the folder and scan again."
            return f"Pair {number}: {role}: {images.errors.get(file, f'{path} cannot be read.')}"

        findings.add("error", code, message, (number,), (path,))


def _check_lengths(
    pairs: Sequence[PreferencePair],
    wanted: np.ndarray,
    count_tokens: Callable[[str], int],
    window: int,
    findings: Findings,
) -> None:
    """Prompts of the wanted pairs [N] that are longer than the text encoder's window."""
    lengths: dict[str, int] = {}
    for number, pair in _those(pairs, wanted):
        for prompt in dict.fromkeys((pair.prompt, pair.rejected_prompt, pair.base_prompt)):
            if prompt is None:
                continue
            if prompt not in lengths:
                lengths[prompt] = count_tokens(prompt)
            if lengths[prompt] > window:
                message = (
                    f"Pair {number}: the prompt has {lengths[prompt]} tokens, over {window}; it is encoded in chunks, "
                    f"as ComfyUI does. It begins: {collapse(prompt)[:60]}"
                )
                findings.add("note", "prompt-too-long", lambda text=message: text, (number,), (pair.chosen,))


def _check_captions(
    pairs: Sequence[PreferencePair], wanted: np.ndarray, found: Sequence[Finding], findings: Findings
) -> None:
    """Captions that were not read, where the prompt had to come from the file name."""
    known = {path for finding in found if finding.code == "caption-name" for path in finding.paths}
    suspects = [p.chosen for _, p in _those(pairs, wanted) if not p.prompt.strip() or FILE_NAME_SOURCE in p.source]
    hints = (caption_hint(path) for path in dict.fromkeys(suspects) if path not in known)
    findings.extend(hint for hint in hints if hint)


def _those(pairs: Sequence[PreferencePair], wanted: np.ndarray) -> Iterator[tuple[int, PreferencePair]]:
    """The wanted pairs [N] with their numbers from 1; a few of many are read one by one."""
    if wanted.all():
        yield from enumerate(pairs, start=1)
    else:
        yield from ((n + 1, pairs[n]) for n in np.flatnonzero(wanted).tolist())


def _check_sizes(
    number: int,
    pair: PreferencePair,
    of_images: list[Size],
    target: Size,
    fits: Callable[[Size, Size], Fit],
    findings: Findings,
) -> None:
    for role, path, size in zip(("chosen", "rejected"), (pair.chosen, pair.rejected), of_images, strict=True):
        fitted = fits(size, target)
        where = f"Pair {number}: {role} image ({size[0]} x {size[1]})"
        enlargement = fitted.resized[0] / size[0]
        if enlargement > MAX_ENLARGEMENT:
            findings.add(
                "warning",
                "low-resolution",
                lambda where=where, by=enlargement, path=path: (
                    f"{where} is enlarged {by:.1f} times to {target[0]} x {target[1]}: {path}. Use a larger "
                    "original, or train at a lower resolution."
                ),
                (number,),
                (path,),
            )
        if fitted.lost > MAX_LOST:
            whose = "its" if role == "chosen" else "the chosen image's"
            findings.add(
                "warning",
                "loses-in-crop",
                lambda where=where, lost=fitted.lost, whose=whose, path=path: (
                    f"{where} loses {lost:.0%} in {whose} bucket, {target[0]} x {target[1]}: {path}. Crop it to "
                    "that shape yourself where the subject must stay in view."
                ),
                (number,),
                (path,),
            )


def _check_masks(number: int, pair: PreferencePair, files: list[int], images: Inventory, findings: Findings) -> None:
    """Masks that fit no image, or leave nothing of it."""
    for role, image, file, mask in (
        ("chosen", files[0], files[2], pair.chosen_mask),
        ("rejected", files[1], files[3], pair.rejected_mask),
    ):
        if mask is None or not images.known[file] or not images.known[image]:
            continue
        (width, height), (own_width, own_height) = images.size(image), images.size(file)
        if images.slots[file] >= 0 and images.traits[images.slots[file], 0] == 0:
            findings.add(
                "error",
                "black-mask",
                lambda role=role, mask=mask: (
                    f"Pair {number}: the {role} mask is black: {mask}. Nothing of its image would count; paint "
                    "white what should, or remove the mask."
                ),
                (number,),
                (mask,),
            )
        elif abs(own_width / own_height * height / width - 1) > MASK_TOLERANCE:
            words = (
                f"Pair {number}: the {role} mask ({own_width} x {own_height}) has another shape than its image "
                f"({width} x {height}): {mask}. Save it at the size of the image."
            )
            findings.add("error", "mask-shape", lambda words=words: words, (number,), (mask,))


def _check_same(
    number: int, pair: PreferencePair, files: list[int], images: Inventory, closely: bool, findings: Findings
) -> None:
    """Chosen and rejected that are the same picture, or nearly so."""
    paths = (pair.chosen, pair.rejected)
    if images.same(files[0], files[1]):
        findings.add(
            "error",
            "identical-pair",
            lambda: (
                f"Pair {number}: chosen and rejected are the same picture: {pair.chosen} and {pair.rejected}. There is "
                "nothing to prefer; replace one, or remove the pair."
            ),
            (number,),
            paths,
        )
    elif closely and looks_same(images.signatures(files[:2])):
        findings.add(
            "warning",
            "near-identical-pair",
            lambda: (
                f"Pair {number}: chosen and rejected look nearly the same: {pair.chosen} and {pair.rejected}. Remove "
                "the pair, unless its fine detail is what you prefer."
            ),
            (number,),
            paths,
        )


def _vote_keys(pair: PreferencePair, chosen: int, rejected: int) -> tuple[int, int]:
    text = collapse(pair.prompt).encode(errors="surrogatepass")
    one, other = (
        int.from_bytes(blake2b(b"%d %d " % order + text, digest_size=8).digest(), "big") or 1
        for order in ((chosen, rejected), (rejected, chosen))
    )
    return one, other


def _check_votes(pairs: Sequence[PreferencePair], keys: np.ndarray, findings: Findings) -> None:
    """The same pictures for the same prompt, more than once or both ways."""
    rows = np.flatnonzero(keys[:, 0])
    votes, first, inverse, counts = np.unique(keys[rows, 0], return_index=True, return_inverse=True, return_counts=True)
    members, ends = np.argsort(inverse.reshape(-1), kind="stable"), np.cumsum(counts)
    place = np.searchsorted(votes, keys[rows[first], 1])
    place[place == len(votes)] = 0
    against: np.ndarray = np.where(votes[place] == keys[rows[first], 1], place, -1) if len(votes) else place

    def numbers_of(vote: int) -> list[int]:
        return (rows[members[ends[vote] - counts[vote] : ends[vote]]] + 1).tolist()

    for vote in np.argsort(first).tolist():
        if counts[vote] == 1 and against[vote] < 0:
            continue
        numbers = numbers_of(vote)
        told = findings.tells("warning", "contradictory-vote") or findings.tells("warning", "repeated-pair")
        pair = pairs[numbers[0] - 1 if told else 0]
        paths = (pair.chosen, pair.rejected)
        opposite = numbers_of(int(against[vote])) if against[vote] >= 0 else []
        if opposite and numbers[0] < opposite[0]:
            findings.add(
                "warning",
                "contradictory-vote",
                lambda pair=pair, numbers=numbers, opposite=opposite: (
                    f"Pairs {_listed(numbers)} prefer {pair.chosen} to {pair.rejected}, pairs {_listed(opposite)} the "
                    "other way round, for the same prompt. Remove the votes that are wrong."
                ),
                (*numbers, *opposite),
                paths,
            )
        if len(numbers) > 1:
            findings.add(
                "warning",
                "repeated-pair",
                lambda pair=pair, numbers=numbers: (
                    f"Pairs {_listed(numbers)} are the same: {pair.chosen} and {pair.rejected}. Remove all but one, "
                    "unless it is meant to weigh more."
                ),
                numbers,
                paths,
            )


def _check_duplicates(
    pairs: Sequence[PreferencePair], images: Inventory, near_among: np.ndarray, findings: Findings
) -> None:
    """Different files with the same picture or, among the images of the pairs `near_among` [N], nearly the same."""
    nearby = images.of_pairs(near_among) & (images.slots >= 0)
    for field, role in enumerate(("chosen", "rejected")):
        column = images.numbers[:, field]
        used, first = np.unique(column, return_index=True)
        used = used[np.argsort(first)]  # in the order in which they come in this role
        used = used[images.known[used]]
        by_file = np.argsort(column, kind="stable")
        edges = np.searchsorted(column[by_file], np.arange(len(images) + 1))
        _, firsts = np.unique(images.identity[used], return_index=True)
        different = used[np.sort(firsts)]
        different = different[nearby[different]]
        for code, files, groups, what in (
            ("exact-duplicate", used, equal_groups(images.identity[used]), "the same picture"),
            ("near-duplicate", different, near_groups(images.signatures(different)), "nearly the same picture"),
        ):
            for group in groups:
                where = np.sort(np.concatenate([by_file[edges[n] : edges[n + 1]] for n in files[group]]) + 1).tolist()
                count = len(group)
                named = files[group[: findings.told]] if findings.tells("warning", code) else files[:0]
                paths = [getattr(pairs[int(by_file[edges[n]])], role) for n in named]
                shown = ", ".join(str(path) for path in paths[:3]) + (", ..." if len(group) > 3 else "")
                findings.add(
                    "warning",
                    code,
                    lambda count=count, role=role, what=what, where=where, shown=shown: (
                        f"{count} {role} images are {what} (pairs {_listed(where)}): {shown}. Keep one, unless it is "
                        "meant to weigh more."
                    ),
                    where,
                    paths,
                )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
