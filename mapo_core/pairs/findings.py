"""What is wrong, or worth knowing, about a set of pairs, and how it is shown."""

from __future__ import annotations

import json
import textwrap
from array import array
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

Level = Literal["error", "warning", "note"]

LEVELS: tuple[Level, ...] = ("error", "warning", "note")
WIDTH = 96  # columns
EXAMPLES = 3
KEEP_FIRST = frozenset({"exact-duplicate", "near-duplicate", "repeated-pair"})

TITLES = {
    "ambiguous-name": "two images of one folder have the same name",
    "black-mask": "masks that leave nothing of their image",
    "caption-empty": "caption files without text",
    "caption-encoding": "caption files that are not UTF-8",
    "caption-missing": "images without a caption file",
    "caption-name": "caption files that are not read because of their name",
    "contradictory-vote": "the same two images, voted both ways",
    "exact-duplicate": "different files with the same picture",
    "identical-pair": "chosen and rejected are the same picture",
    "loses-in-crop": "images that lose much in their bucket",
    "low-resolution": "images far below the training resolution",
    "mask-shape": "masks of another shape than their image",
    "missing-image": "images that are not there",
    "missing-partner": "images without a partner in the other folder",
    "near-duplicate": "different files with nearly the same picture",
    "near-identical-pair": "chosen and rejected look the same",
    "no-prompt": "no prompt",
    "prompt-from-file-name": "prompts made from file names",
    "prompt-too-long": "prompts longer than the text encoder's window",
    "repeated-pair": "the same pair more than once",
    "rows-left-out": "rows that give no pair",
    "sampled": "a large set, of which some pairs were looked at more closely",
    "shortcut-bias": "chosen and rejected differ systematically in something simple",
    "too-many-pixels": "images too large to open safely",
    "unreadable-image": "files that cannot be read as images",
    "unread-format": "image formats that are not read",
}


@dataclass(frozen=True)
class Finding:
    """One fact about the pairs.

    Attributes:
        level: "error" stops, "warning" should be looked at, "note" is for information.
        code: kind of finding, a key of `TITLES`.
        message: what, where, and what to do next.
        pairs: numbers of the pairs as in the message, from 1 (the line of `pairs.jsonl`).
        paths: the files.
        count: how many of its kind it speaks for; more than one where a large set has too many to tell one by one.
    """

    level: Level
    code: str
    message: str
    pairs: tuple[int, ...] = ()
    paths: tuple[Path, ...] = ()
    count: int = 1


class Findings:
    """Findings while they are collected: of a kind that a large set has very many of, the first are told one by one.

    Args:
        told: how many of a kind are; None: all.
    """

    def __init__(self, told: int | None = None) -> None:
        self.told = told
        self._found: list[Finding] = []
        self._counts: Counter[tuple[Level, str]] = Counter()
        self._rest: dict[tuple[Level, str], array[int]] = {}

    def add(
        self, level: Level, code: str, message: Callable[[], str], pairs: Sequence[int], paths: Sequence[Path] = ()
    ) -> None:
        """Add a finding; its words are made only if it is told by itself."""
        kind = (level, code)
        self._counts[kind] += 1
        if self.told is None or self._counts[kind] <= self.told:
            self._found.append(Finding(level, code, message(), tuple(pairs), tuple(paths)))
            return
        rest = self._rest.setdefault(kind, array("q"))
        rest.extend(pairs[1:] if rest and code in KEEP_FIRST else pairs)  # a filter keeps the first pair of such a kind

    def tells(self, level: Level, code: str) -> bool:
        """Whether the next finding of this kind is told by itself, so that its words and paths are worth making."""
        return self.told is None or self._counts[level, code] < self.told

    def extend(self, findings: Iterable[Finding]) -> None:
        """Add findings as they are."""
        self._found += findings

    def sorted(self) -> tuple[Finding, ...]:
        """All of them, errors first; one more for the rest of each kind."""
        closing = [
            Finding(
                level,
                code,
                f"{self._counts[level, code] - (self.told or 0)} more of this kind are not told one by one; the first "
                f"is pair {rest[0] if rest else '?'}.",
                tuple(rest),
                count=self._counts[level, code] - (self.told or 0),
            )
            for (level, code), rest in self._rest.items()
        ]
        return sort_findings([*self._found, *closing])


@dataclass(frozen=True)
class LintReport:
    """All findings of a check.

    Attributes:
        findings: errors first, then warnings, then notes.
        pair_count: pairs that were checked.
        image_count: different image files among them.
        looked_at: pairs whose images were decoded, drawn at random; None: all.
    """

    findings: tuple[Finding, ...]
    pair_count: int
    image_count: int
    looked_at: int | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What has to be repaired before training."""
        return tuple(f for f in self.findings if f.level == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """What a person should look at."""
        return tuple(f for f in self.findings if f.level == "warning")

    def count(self, level: Level) -> int:
        """How many findings of a level there are, those that are not told one by one too."""
        return sum(f.count for f in self.findings if f.level == level)

    def render(self) -> str:
        """The report as text, at most 96 columns where paths allow, with the first examples of each kind."""
        groups: dict[tuple[Level, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.level, finding.code), []).append(finding)
        blocks = [_render_group(level, code, found) for (level, code), found in groups.items()]
        return "\n\n".join([*blocks, self._summary()]) + "\n"

    def to_json(self) -> str:
        """The report as JSON text."""
        values = {
            "pairs": self.pair_count,
            "images": self.image_count,
            "looked_at": self.pair_count if self.looked_at is None else self.looked_at,
            **{f"{level}s": self.count(level) for level in LEVELS},
            "findings": [{**asdict(f), "paths": [str(path) for path in f.paths]} for f in self.findings],
        }
        return json.dumps(values, indent=2) + "\n"

    def _summary(self) -> str:
        checked = f"{_count(self.pair_count, 'pair')} with {_count(self.image_count, 'image')} checked"
        if self.looked_at is not None:
            checked += f", the images of {_count(self.looked_at, 'pair')} decoded"
        found = [_count(number, level) for level in LEVELS if (number := self.count(level))]
        verdict = ", ".join(found) if found else "nothing found"
        return f"{checked}: {verdict}." + (" Repair the errors and check again." if self.errors else "")


def sort_findings(findings: list[Finding]) -> tuple[Finding, ...]:
    """Errors first; within a level by code, then by pair."""
    return tuple(sorted(findings, key=lambda f: (LEVELS.index(f.level), f.code, f.pairs, f.message)))


def _render_group(level: Level, code: str, found: list[Finding]) -> str:
    count = sum(finding.count for finding in found)
    lines = [f"{level.upper()}  {code} ({count}): {TITLES[code]}"]
    for finding in found[:EXAMPLES]:
        lines += textwrap.wrap(
            finding.message,
            WIDTH,
            initial_indent="  - ",
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    if len(found) > EXAMPLES:
        lines.append(f"    and {count - EXAMPLES} more")
    return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
