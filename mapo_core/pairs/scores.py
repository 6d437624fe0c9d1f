"""Preference scores of the pairs: whether they are all there, and the same scores between 0 and 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import PairsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .pair import PreferencePair


def normalised_scores(pairs: Sequence[PreferencePair]) -> list[tuple[float, float]] | None:
    """(chosen, rejected) of every pair, min-max normalised over all scores of the set; None if there is nothing to
    normalise: a score is missing, or all are the same."""
    found = [(p.chosen_score, p.rejected_score) for p in pairs]
    scores = [(c, r) for c, r in found if c is not None and r is not None]
    flat = [s for pair in scores for s in pair]
    if len(scores) < len(pairs) or not flat or max(flat) == min(flat):
        return None
    low, span = min(flat), max(flat) - min(flat)
    return [((c - low) / span, (r - low) / span) for c, r in scores]


def require_scores(pairs: Sequence[PreferencePair], method: str) -> None:
    """Stop before a run that needs scores and has none.

    Args:
        pairs: the set.
        method: that needs them, as `method.type` names it.

    Raises:
        PairsError: `problems` has every pair without scores.
    """
    missing = [n for n, p in enumerate(pairs, start=1) if p.chosen_score is None or p.rejected_score is None]
    advice = (
        "Give both in the pair set (chosen_score and rejected_score in JSONL or CSV; of a scorer such as PickScore), "
        "or train with another method."
    )
    if missing:
        raise PairsError(
            f"Method {method} needs a chosen_score and a rejected_score for every pair; {len(missing)} of {len(pairs)} "
            f"pairs have none, the first is pair {missing[0]}. {advice}",
            [f"pair {n}: no scores" for n in missing],
        )
    if normalised_scores(pairs) is None:
        raise PairsError(f"Method {method} needs scores that differ; all scores of the pairs are the same. {advice}")
