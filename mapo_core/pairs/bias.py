"""Shortcut bias: something simple by which chosen and rejected images can be told apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .findings import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .measure import ImageFacts

MIN_PAIRS = 8
MIN_EFFECT = 0.5  # Cohen's "medium"
SMALL_EFFECT = 0.2  # Cohen's "small"


@dataclass(frozen=True)
class Trait:
    """Something simple about an image.

    Attributes:
        more, less: how the chosen images differ when their value is the larger, or the smaller.
        measure: what is measured, for people.
        value: measure of an image, on a scale where differences mean the same everywhere.
        shown: the measure on the scale that people know.
        min_difference: smallest mean difference that matters, however regular it is.
    """

    more: str
    less: str
    measure: str
    value: Callable[[ImageFacts], float]
    shown: Callable[[float], float]
    min_difference: float


TRAITS = (
    Trait("brighter", "darker", "mean brightness", lambda f: f.brightness, lambda v: v, 0.02),
    Trait("more saturated", "less saturated", "mean saturation", lambda f: f.saturation, lambda v: v, 0.02),
    Trait("sharper", "softer", "fine detail (log2)", lambda f: f.sharpness, lambda v: v, 0.15),
    Trait(
        "larger",
        "smaller",
        "typical size in million pixels",
        lambda f: math.log2(f.size[0] * f.size[1]),
        lambda v: 2**v / 1e6,
        0.15,
    ),
    Trait(
        "wider",
        "taller",
        "typical width to height",
        lambda f: math.log2(f.size[0] / f.size[1]),
        lambda v: 2**v,
        0.07,
    ),
)


def paired_effect(differences: np.ndarray) -> tuple[float, float, float]:
    """Cohen's d of paired differences, and its 95 % interval.

    d_z = mean / standard deviation of the differences (Lakens 2013, doi 10.3389/fpsyg.2013.00863, eq. 6); the interval
    is Student's t interval of the mean, in the same unit: d -+ t / sqrt(n).

    Args:
        differences: float [N], N >= 2, with some spread.

    Returns:
        d, lower end, upper end.
    """
    n = len(differences)
    d = float(differences.mean() / differences.std(ddof=1))
    half = _t_quantile(n - 1) / math.sqrt(n)
    return d, d - half, d + half


def find_bias(pairs: Sequence[tuple[ImageFacts, ImageFacts]]) -> list[Finding]:
    """Traits in which chosen and rejected images differ systematically.

    A trait is reported from 8 pairs on, when the mean difference is large enough to see (`Trait.min_difference`), d is
    at least 0.5 and the near end of its interval is beyond 0.2: Cohen's bounds for a medium and a small effect
    (Statistical Power Analysis for the Behavioral Sciences, 2nd ed. 1988, section 2.2). By chance alone at most one set
    of 8 pairs in ten, and hardly one of 50, has a trait reported.

    Args:
        pairs: measures of (chosen, rejected).
    """
    values = np.array([[[trait.value(f) for trait in TRAITS] for f in pair] for pair in pairs])  # [N, 2, 5]
    return bias_of(len(pairs), lambda trait: values[:, :, trait])


def bias_of(count: int, values: Callable[[int], np.ndarray]) -> list[Finding]:
    """As `find_bias`, from the measures.

    Args:
        count: of pairs.
        values: gives a trait of (chosen, rejected), [N, 2], by its place in `TRAITS`.
    """
    if count < MIN_PAIRS:
        return []
    return [finding for i, trait in enumerate(TRAITS) if (finding := _bias(trait, values(i)))]


def _bias(trait: Trait, values: np.ndarray) -> Finding | None:
    differences = values[:, 0] - values[:, 1]  # [N]
    mean = float(differences.mean())
    if abs(mean) < trait.min_difference:
        return None
    if differences.std() < 1e-6 * abs(mean):
        effect = "by the same amount everywhere"
    else:
        d, low, high = paired_effect(differences)
        if abs(d) < MIN_EFFECT or min(abs(low), abs(high)) < SMALL_EFFECT or low * high < 0:
            return None
        effect = f"Cohen's d = {d:.2f}, 95 % interval {low:.2f} to {high:.2f}"
    chosen, rejected = (trait.shown(float(v)) for v in values.mean(axis=0))
    share = int((np.sign(differences) == np.sign(mean)).sum())
    message = (
        f"Chosen images are {trait.more if mean > 0 else trait.less} in {share} of {len(values)} pairs: "
        f"{trait.measure} {chosen:.2g} against {rejected:.2g} ({effect}). The LoRA can learn this instead of what you "
        "mean; if it is not part of the wanted look, choose images that do not differ in it."
    )
    return Finding("warning", "shortcut-bias", message)


def _t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t from 7 degrees of freedom on, to 1e-3 (Abramowitz and Stegun, 26.7.5)."""
    z = 1.959964
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / freedom**k for k, term in enumerate(terms, start=1))
