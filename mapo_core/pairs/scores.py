"""Preference scores of the pairs: whether they are all there, and the same scores between 0 and 1."""

from __future__ import annotations

import math
from array import array
from typing import TYPE_CHECKING

from ..errors import PairsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .pair import PreferencePair


def score_range(pairs: Iterable[PreferencePair]) -> tuple[float, float] | None:
    """The lowest of all scores and how far the highest is above it, by which they are brought between 0 and 1; None
    if there is nothing to normalise: a score is missing, or all are the same."""
    low, high = math.inf, -math.inf
    for pair in pairs:
        if pair.chosen_score is None or pair.rejected_score is None:
            return None
        low = min(low, pair.chosen_score, pair.rejected_score)
        high = max(high, pair.chosen_score, pair.rejected_score)
    return (low, high - low) if high > low else None


def normalised_scores(pairs: Sequence[PreferencePair]) -> list[tuple[float, float]] | None:
    """(chosen, rejected) of every pair, min-max normalised over all scores of the set; None as of `score_range`."""
    found = score_range(pairs)
    if found is None:
        return None
    low, span = found
    scores = [(p.chosen_score, p.rejected_score) for p in pairs]
    return [((c - low) / span, (r - low) / span) for c, r in scores if c is not None and r is not None]


def require_scores(pairs: Sequence[PreferencePair], method: str) -> None:
    """Stop before a run that needs scores and has none.

    Args:
        pairs: the set.
        method: that needs them, as `method.type` names it.

    Raises:
        PairsError: `problems` has the pairs without scores, of very many the first thousand.
    """
    missing = array(
        "q", (n for n, p in enumerate(pairs, start=1) if p.chosen_score is None or p.rejected_score is None)
    )
    advice = (
        "Give both in the pair set (chosen_score and rejected_score in JSONL or CSV; of a scorer such as PickScore), "
        "or train with another method."
    )
    if missing:
        raise PairsError(
            f"Method {method} needs a chosen_score and a rejected_score for every pair; {len(missing)} of {len(pairs)} "
            f"pairs have none, the first is pair {missing[0]}. {advice}",
            [f"pair {n}: no scores" for n in missing[:1000]],
        )
    if score_range(pairs) is None:
        raise PairsError(f"Method {method} needs scores that differ; all scores of the pairs are the same. {advice}")
