"""The check of a set of pairs, before any GPU time is spent on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..buckets import bucket_sizes, fit, nearest_bucket
from ..errors import PairsError
from .bias import find_bias
from .captions import FILE_NAME_SOURCE, caption_hint, collapse
from .duplicates import exact_groups, looks_same, near_groups
from .findings import Finding, LintReport, sort_findings
from .images import TooManyPixelsError
from .measure import ImageFacts, measure_all
from .pair import IMAGE_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from .pair import PreferencePair

MAX_ENLARGEMENT = 1.5
"""An image that must be enlarged more than this to cover its bucket is far below the training resolution."""
MAX_LOST = 0.2
"""Share of an image's area that its bucket may cut off without a warning."""

MASK_TOLERANCE = 0.02
"""How far the aspect ratios of an image and its mask may differ."""

Measured = list[tuple[int, "PreferencePair", ImageFacts, ImageFacts]]  # (number, pair, chosen, rejected)


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
) -> LintReport:
    """Check pairs; nothing is changed. Errors should stop a run, warnings should be looked at.

    Args:
        pairs: as they would be trained.
        resolution, bucket, bucket_step, max_aspect: as in `DataConfig`; resolution and step in pixels.
        count_tokens: tokens of a prompt, with those that begin and end it; None: prompts are not measured.
        token_window: tokens that the text encoder takes at a time.
        found: findings of the reader that made the pairs (`PairSet.findings`), to be part of the report.
        progress: called with (images done, images in all).
    """
    files = list(dict.fromkeys(path for pair in pairs for name in IMAGE_FIELDS if (path := getattr(pair, name))))
    results = measure_all(files, resolution, progress)
    facts = {path: result for path, result in results.items() if isinstance(result, ImageFacts)}
    measured: Measured = [
        (number, pair, facts[pair.chosen], facts[pair.rejected])
        for number, pair in enumerate(pairs, start=1)
        if pair.chosen in facts and pair.rejected in facts
    ]
    findings = [*found]
    findings += _check_files(pairs, results)
    findings += _check_prompts(pairs, count_tokens, token_window)
    findings += _check_captions(pairs, found)
    findings += _check_sizes(measured, resolution, bucket, bucket_step, max_aspect)
    findings += _check_masks(pairs, facts)
    findings += _check_same(measured)
    findings += _check_votes(measured)
    findings += _check_duplicates(pairs, facts)
    findings += find_bias([(chosen, rejected) for _, _, chosen, rejected in measured])
    return LintReport(sort_findings(findings), len(pairs), len(files))


def _check_files(pairs: Sequence[PreferencePair], results: dict[Path, ImageFacts | PairsError]) -> list[Finding]:
    findings = []
    for number, pair in enumerate(pairs, start=1):
        for name in IMAGE_FIELDS:
            path = getattr(pair, name)
            error = results.get(path)
            if not isinstance(error, PairsError):
                continue
            role = name.replace("_", " ") + ("" if name.endswith("mask") else " image")
            if not path.exists():
                code, text = "missing-image", f"{role} is missing: {path}. Fix the folder and scan again."
            else:
                code = "too-many-pixels" if isinstance(error, TooManyPixelsError) else "unreadable-image"
                text = f"{role}: {error}"
            findings.append(Finding("error", code, f"Pair {number}: {text}", (number,), (path,)))
    return findings


def _check_prompts(
    pairs: Sequence[PreferencePair], count_tokens: Callable[[str], int] | None, window: int
) -> list[Finding]:
    findings = []
    lengths: dict[str, int] = {}
    for number, pair in enumerate(pairs, start=1):
        if not pair.prompt.strip():
            message = f"Pair {number}: the prompt is empty. Write one, unless the look is meant to need no prompt."
            findings.append(Finding("warning", "no-prompt", message, (number,), (pair.chosen,)))
        for prompt in dict.fromkeys((pair.prompt, pair.rejected_prompt, pair.base_prompt)):
            if count_tokens is None or prompt is None:
                continue
            if prompt not in lengths:
                lengths[prompt] = count_tokens(prompt)
            if lengths[prompt] > window:
                message = (
                    f"Pair {number}: the prompt has {lengths[prompt]} tokens, over {window}; it is encoded in chunks, "
                    f"as ComfyUI does. It begins: {collapse(prompt)[:60]}"
                )
                findings.append(Finding("note", "prompt-too-long", message, (number,), (pair.chosen,)))
    return findings


def _check_captions(pairs: Sequence[PreferencePair], found: Sequence[Finding]) -> list[Finding]:
    """Captions that were not read, where the prompt had to come from the file name."""
    known = {path for finding in found if finding.code == "caption-name" for path in finding.paths}
    suspects = [p.chosen for p in pairs if not p.prompt.strip() or FILE_NAME_SOURCE in p.source]
    hints = (caption_hint(path) for path in dict.fromkeys(suspects) if path not in known)
    return [hint for hint in hints if hint]


def _check_sizes(measured: Measured, resolution: int, bucket: bool, step: int, max_aspect: float) -> list[Finding]:
    sizes = bucket_sizes(resolution, step, max_aspect) if bucket else bucket_sizes(resolution, step, 1.0)
    findings = []
    for number, pair, chosen, rejected in measured:
        target = nearest_bucket(chosen.size, sizes)
        for role, path, image in (("chosen", pair.chosen, chosen), ("rejected", pair.rejected, rejected)):
            width, height = image.size
            fitted = fit(image.size, target)
            where = f"Pair {number}: {role} image ({width} x {height})"
            if (enlargement := fitted.resized[0] / width) > MAX_ENLARGEMENT:
                message = (
                    f"{where} is enlarged {enlargement:.1f} times to {target[0]} x {target[1]}: {path}. Use a larger "
                    "original, or train at a lower resolution."
                )
                findings.append(Finding("warning", "low-resolution", message, (number,), (path,)))
            if fitted.lost > MAX_LOST:
                whose = "its" if role == "chosen" else "the chosen image's"
                message = (
                    f"{where} loses {fitted.lost:.0%} in {whose} bucket, {target[0]} x {target[1]}: {path}. Crop it to "
                    "that shape yourself where the subject must stay in view."
                )
                findings.append(Finding("warning", "loses-in-crop", message, (number,), (path,)))
    return findings


def _check_masks(pairs: Sequence[PreferencePair], facts: dict[Path, ImageFacts]) -> list[Finding]:
    """Masks that fit no image, or leave nothing of it."""
    findings = []
    for number, pair in enumerate(pairs, start=1):
        for role, image, mask in (
            ("chosen", pair.chosen, pair.chosen_mask),
            ("rejected", pair.rejected, pair.rejected_mask),
        ):
            if mask is None or mask not in facts or image not in facts:
                continue
            (width, height), (own_width, own_height) = facts[image].size, facts[mask].size
            if facts[mask].brightness == 0:
                message = (
                    f"Pair {number}: the {role} mask is black: {mask}. Nothing of its image would count; paint "
                    "white what should, or remove the mask."
                )
                findings.append(Finding("error", "black-mask", message, (number,), (mask,)))
            elif abs(own_width / own_height * height / width - 1) > MASK_TOLERANCE:
                message = (
                    f"Pair {number}: the {role} mask ({own_width} x {own_height}) has another shape than its image "
                    f"({width} x {height}): {mask}. Save it at the size of the image."
                )
                findings.append(Finding("error", "mask-shape", message, (number,), (mask,)))
    return findings


def _check_same(measured: Measured) -> list[Finding]:
    """Chosen and rejected that are the same picture, or nearly so."""
    findings = []
    for number, pair, chosen, rejected in measured:
        paths = (pair.chosen, pair.rejected)
        if chosen.pixels == rejected.pixels:
            message = (
                f"Pair {number}: chosen and rejected are the same picture: {pair.chosen} and {pair.rejected}. There is "
                "nothing to prefer; replace one, or remove the pair."
            )
            findings.append(Finding("error", "identical-pair", message, (number,), paths))
        elif looks_same(chosen, rejected):
            message = (
                f"Pair {number}: chosen and rejected look nearly the same: {pair.chosen} and {pair.rejected}. Remove "
                "the pair, unless its fine detail is what you prefer."
            )
            findings.append(Finding("warning", "near-identical-pair", message, (number,), paths))
    return findings


def _check_votes(measured: Measured) -> list[Finding]:
    """The same pictures for the same prompt, more than once or both ways."""
    votes: dict[tuple[str, bytes, bytes], list[int]] = {}
    by_number = {number: pair for number, pair, _, _ in measured}
    for number, pair, chosen, rejected in measured:
        votes.setdefault((collapse(pair.prompt), chosen.pixels, rejected.pixels), []).append(number)
    findings = []
    for (prompt, chosen, rejected), numbers in votes.items():
        pair = by_number[numbers[0]]
        paths = (pair.chosen, pair.rejected)
        opposite = votes.get((prompt, rejected, chosen), [])
        if opposite and numbers[0] < opposite[0]:
            message = (
                f"Pairs {_listed(numbers)} prefer {pair.chosen} to {pair.rejected}, pairs {_listed(opposite)} the "
                "other way round, for the same prompt. Remove the votes that are wrong."
            )
            findings.append(Finding("warning", "contradictory-vote", message, (*numbers, *opposite), paths))
        if len(numbers) > 1:
            message = (
                f"Pairs {_listed(numbers)} are the same: {pair.chosen} and {pair.rejected}. Remove all but one, unless "
                "it is meant to weigh more."
            )
            findings.append(Finding("warning", "repeated-pair", message, tuple(numbers), paths))
    return findings


def _check_duplicates(pairs: Sequence[PreferencePair], facts: dict[Path, ImageFacts]) -> list[Finding]:
    findings = []
    for role in ("chosen", "rejected"):
        numbers: dict[Path, list[int]] = {}
        for number, pair in enumerate(pairs, start=1):
            path = getattr(pair, role)
            if path in facts:
                numbers.setdefault(path, []).append(number)
        paths = list(numbers)
        for code, groups, what in (
            ("exact-duplicate", exact_groups(paths, facts), "the same picture"),
            ("near-duplicate", near_groups(paths, facts), "nearly the same picture"),
        ):
            for group in groups:
                shown = ", ".join(str(path) for path in group[:3]) + (", ..." if len(group) > 3 else "")
                where = sorted({number for path in group for number in numbers[path]})
                message = (
                    f"{len(group)} {role} images are {what} (pairs {_listed(where)}): {shown}. Keep one, unless it is "
                    "meant to weigh more."
                )
                findings.append(Finding("warning", code, message, tuple(where), tuple(group)))
    return findings


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
