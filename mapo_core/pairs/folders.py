"""Pairs from two folders of images, and prompts for one."""

from __future__ import annotations

import logging
import random
import unicodedata
from typing import TYPE_CHECKING, Literal, get_args

from ..errors import PairsError
from .captions import PROMPT_FROM, Captioned, PromptFrom, caption_images
from .findings import Finding
from .images import IMAGE_SUFFIXES, list_files, list_images
from .masks import masks_of
from .pair import PairSet, PreferencePair

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

logger = logging.getLogger(__name__)

Match = Literal["stem", "order", "random"]
_MATCHED_BY = {"stem": "file name", "order": "order", "random": "prompt"}
Matches = list[tuple["Path", "Path"]]  # (chosen, rejected)

# Formats that people have and that Pillow does not read by itself.
_UNREAD_SUFFIXES = frozenset({".heic", ".heif", ".jxl", ".psd", ".svg", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw"})


def pairs_from_folders(
    chosen: Path,
    rejected: Path,
    *,
    match: Match = "stem",
    prompt: str | None = None,
    prompt_from: PromptFrom = "auto",
    trigger: str = "",
    prefix: str = "",
    seed: int = 0,
    recursive: bool = True,
    keep_unprompted: bool = False,
) -> PairSet:
    """Pair the images of two folders. `name-masklabel.png` beside an image `name.*` is its mask.

    Args:
        chosen: folder of preferred images; may lie inside `rejected`, or the other way round.
        rejected: folder of the others.
        match: "stem": same path below the folder without the suffix, else the same file stem where that is unique;
            "order": first with first, in natural order; "random": every chosen image with a random rejected one of the
            same prompt, drawn for each chosen image from `seed` and its name.
        prompt: the fixed prompt.
        prompt_from: the only source of prompts, or "auto": the `.txt` beside the chosen image, else its metadata, else
            `prompt`, else the file name.
        trigger: word put before every prompt.
        prefix: text between the trigger word and the prompt.
        seed: of the random match.
        recursive: look into subfolders.
        keep_unprompted: a chosen image without a prompt gives a pair with an empty one, to be filled in later.

    Returns:
        The pairs in natural order of the chosen images; `counts` by where the prompts come from.

    Raises:
        PairsError: a folder is missing or has no images, both are the same, or no pair results.
    """
    _check_choice("match", match, get_args(Match))
    if chosen.resolve() == rejected.resolve():
        raise PairsError(f"Chosen and rejected are the same folder: {chosen}. Name two folders.")
    findings: list[Finding] = []
    images = _scan(chosen, recursive, rejected, findings)
    others = _scan(rejected, recursive, chosen, findings)
    captioned, found = _captioned(images, prompt, prompt_from, trigger, prefix, keep_unprompted)
    findings += found
    if match == "random":
        captioned_others, found = _captioned(others, prompt, prompt_from, trigger, prefix, keep_unprompted)
        findings += found
        matches = _match_random(captioned, captioned_others, chosen, seed, findings)
    else:
        matcher = _match_stems if match == "stem" else _match_order
        matches = matcher(images, others, chosen, rejected, findings)
    masks = masks_of([*list_images(chosen.absolute(), recursive), *list_images(rejected.absolute(), recursive)])
    pairs = [
        PreferencePair(
            prompt=captioned[c].prompt,
            chosen=c,
            rejected=r,
            chosen_mask=masks.get(c),
            rejected_mask=masks.get(r),
            source=f"{match}; {captioned[c].source}",
        )
        for c, r in matches
        if c in captioned
    ]
    if not pairs:
        problems = [finding.message for finding in findings]
        first = f" {problems[0]}" if problems else ""
        raise PairsError(
            f"No pair results from {chosen} and {rejected} matched by {_MATCHED_BY[match]}.{first}", problems
        )
    counts: dict[str, int] = {}
    for c, _ in matches:
        if c in captioned:
            counts[captioned[c].kind] = counts.get(captioned[c].kind, 0) + 1
    return PairSet(pairs, findings, counts)


def prompts_from_folder(
    folder: Path,
    *,
    prompt: str | None = None,
    prompt_from: PromptFrom = "auto",
    trigger: str = "",
    prefix: str = "",
    recursive: bool = True,
) -> list[Captioned]:
    """The images of one folder with their prompts, in natural order; arguments as of `pairs_from_folders`.

    What a person should know is logged as warnings.

    Raises:
        PairsError: the folder is missing or has no images, or images have no prompt (`problems` names all of them).
    """
    findings: list[Finding] = []
    images = _scan(folder, recursive, None, findings)
    captioned, found = _captioned(images, prompt, prompt_from, trigger, prefix)
    findings += found
    problems = [finding.message for finding in findings if finding.level == "error"]
    if problems:
        raise PairsError(f"{len(problems)} images of {folder} have no prompt. {problems[0]}", problems)
    for finding in findings:
        logger.warning("%s", finding.message)
    return list(captioned.values())


def _captioned(
    images: Sequence[Path],
    prompt: str | None,
    prompt_from: PromptFrom,
    trigger: str,
    prefix: str,
    keep_unprompted: bool = False,
) -> tuple[dict[Path, Captioned], list[Finding]]:
    _check_choice("prompt_from", prompt_from, PROMPT_FROM)
    return caption_images(
        images,
        prompt=prompt,
        prompt_from=prompt_from,
        trigger=trigger,
        prefix=prefix,
        keep_unprompted=keep_unprompted,
    )


def _scan(folder: Path, recursive: bool, other: Path | None, findings: list[Finding]) -> list[Path]:
    """Images of a folder, with absolute paths, without those of the other folder where that lies inside."""
    files = list_files(folder.absolute(), recursive)
    if other is not None and other.resolve().is_relative_to(folder.resolve()):
        files = [f for f in files if not f.resolve().is_relative_to(other.resolve())]
    for path in files:
        if path.suffix.lower() in _UNREAD_SUFFIXES:
            message = f"{path} is not read: {path.suffix} is not supported. Save it as PNG or JPEG."
            findings.append(Finding("warning", "unread-format", message, paths=(path,)))
    pictures = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
    masks = set(masks_of(pictures).values())
    images = [f for f in pictures if f not in masks]
    if not images:
        kinds = ", ".join(sorted(IMAGE_SUFFIXES))
        raise PairsError(f"There are no images in {folder}. It needs files such as {kinds}.")
    return images


def _match_stems(
    chosen: list[Path], rejected: list[Path], chosen_root: Path, rejected_root: Path, findings: list[Finding]
) -> Matches:
    left = _by_key(chosen, lambda p: _stem_path(p, chosen_root), findings)
    right = _by_key(rejected, lambda p: _stem_path(p, rejected_root), findings)
    matched = {left[key]: right[key] for key in left if key in right}
    alone = [p for p in left.values() if p not in matched]
    free = [p for key, p in right.items() if key not in left]
    by_stem = _unique_stems(free)
    matched |= {p: by_stem[stem] for stem, p in _unique_stems(alone).items() if stem in by_stem}
    used = set(matched.values())
    _report_missing([p for p in alone if p not in matched], [p for p in free if p not in used], "name", findings)
    return [(p, matched[p]) for p in chosen if p in matched]


def _match_order(
    chosen: list[Path], rejected: list[Path], chosen_root: Path, rejected_root: Path, findings: list[Finding]
) -> Matches:
    matches = list(zip(chosen, rejected, strict=False))
    _report_missing(chosen[len(matches) :], rejected[len(matches) :], "place in the order", findings)
    return matches


def _match_random(
    chosen: dict[Path, Captioned], rejected: dict[Path, Captioned], root: Path, seed: int, findings: list[Finding]
) -> Matches:
    by_prompt: dict[str, list[Path]] = {}
    for path, captioned in rejected.items():
        by_prompt.setdefault(captioned.prompt.casefold(), []).append(path)
    matches: Matches = []
    for path, captioned in chosen.items():
        if candidates := by_prompt.get(captioned.prompt.casefold()):
            name = unicodedata.normalize("NFC", path.relative_to(root.absolute()).as_posix())
            matches.append((path, random.Random(f"{seed}/{name}").choice(candidates)))
    wanted = {captioned.prompt.casefold() for captioned in chosen.values()}
    matched = {c for c, _ in matches}
    unused = [path for path, captioned in rejected.items() if captioned.prompt.casefold() not in wanted]
    _report_missing([path for path in chosen if path not in matched], unused, "prompt", findings)
    return matches


def _by_key(paths: list[Path], key: Callable[[Path], str], findings: list[Finding]) -> dict[str, Path]:
    """Images by key; several with the same key are all left out, because which one is meant is not known."""
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(key(path), []).append(path)
    for group in groups.values():
        if len(group) > 1:
            names = ", ".join(path.name for path in group)
            message = f"{names} in {group[0].parent} have the same name but for the ending. Keep one of them."
            findings.append(Finding("error", "ambiguous-name", message, paths=tuple(group)))
    return {name: group[0] for name, group in groups.items() if len(group) == 1}


def _unique_stems(paths: list[Path]) -> dict[str, Path]:
    groups: dict[str, list[Path]] = {}
    for path in paths:
        groups.setdefault(_normal(path.stem), []).append(path)
    return {stem: group[0] for stem, group in groups.items() if len(group) == 1}


def _stem_path(path: Path, root: Path) -> str:
    return _normal(path.relative_to(root.absolute()).with_suffix("").as_posix())


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)  # macOS stores accents decomposed


def _report_missing(chosen: list[Path], rejected: list[Path], what: str, findings: list[Finding]) -> None:
    for paths, other, others in ((chosen, "rejected", rejected), (rejected, "chosen", chosen)):
        folded = {_normal(p.stem).casefold(): p for p in others}
        for path in paths:
            near = folded.get(_normal(path.stem).casefold()) if what == "name" else None
            hint = f" {near} differs in upper and lower case only." if near else ""
            message = f"{path} has no {other} image of the same {what} and is left out.{hint} Add it and scan again."
            findings.append(Finding("warning", "missing-partner", message, paths=(path,)))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise PairsError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")
