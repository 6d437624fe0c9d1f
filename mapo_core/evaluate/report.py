"""What `mapo evaluate` found: numbers with intervals, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .statistics import Interval, mean_interval

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from ..runs import RunDir
    from .diversity import Diversity
    from .drift import Drift
    from .held_out import HeldOut


@dataclass(frozen=True)
class HeldOutComparison:
    """Held-out pairs, without and with the LoRA.

    Attributes:
        base, lora: the means.
        accuracy_base, accuracy: share of (pair, draw) whose chosen image has the smaller error, with interval.
        accuracy_gain: lora - base, pair by pair.
        margin_gain: likewise of K_l - K_w.
    """

    base: HeldOut
    lora: HeldOut
    accuracy_base: Interval
    accuracy: Interval
    accuracy_gain: Interval
    margin_gain: Interval


@dataclass(frozen=True)
class ScorerComparison:
    """A scorer's numbers for the same prompts and seeds, without and with the LoRA.

    Attributes:
        name, title: of the scorer.
        base, lora: mean scores.
        difference: lora - base.
        win_rate: share of pictures that the scorer puts above the base model's, a tie is half; 0.5 is no difference.
        pictures: how many the scorer could judge.
    """

    name: str
    title: str
    base: Interval
    lora: Interval
    difference: Interval
    win_rate: Interval
    pictures: int


@dataclass(frozen=True)
class RunEvaluation:
    """All measures of one checkpoint.

    Attributes:
        run, step, model, method: what was measured.
        held_out: None where the run held no pair out.
        scores: one per scorer.
        drift: None where no prompt lies outside the training set.
        diversity: None where there is one seed only or no embedder.
        not_measured: what is missing, and why.
        prompts: prompts of the scored pictures.
        prompts_from: where these come from.
        seeds: pictures per prompt.
        num_inference_steps, guidance_scale, width, height: how they were drawn.
        sheet: picture of base model above LoRA, inside the run folder.
        seconds: how long it took.
    """

    run: str
    step: int
    model: str
    method: str
    held_out: HeldOutComparison | None
    scores: tuple[ScorerComparison, ...]
    drift: Drift | None
    diversity: Diversity | None
    not_measured: dict[str, str]
    prompts: tuple[str, ...]
    prompts_from: str
    seeds: int
    num_inference_steps: int
    guidance_scale: float
    width: int
    height: int
    sheet: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The table: measure, base, LoRA, difference, win rate of the LoRA."""
        found: list[tuple[str, str, str, str, str]] = []
        if self.held_out is not None:
            h = self.held_out
            found.append(("held-out pair accuracy", str(h.accuracy_base), str(h.accuracy), signed(h.accuracy_gain), ""))
            margins = (f"{h.base.margin:+.4f}", f"{h.lora.margin:+.4f}", signed(h.margin_gain, 4))
            found.append(("held-out margin K_l - K_w", *margins, ""))
        found += [(s.title, str(s.base), str(s.lora), signed(s.difference), str(s.win_rate)) for s in self.scores]
        if self.diversity is not None:
            d = self.diversity
            found.append(("diversity across seeds", str(d.base), str(d.lora), signed(d.difference), ""))
        if self.drift is not None:
            text = f"{self.drift.distance.value:.4f}, {self.drift.relative:.2f} of base error"
            found.append(("drift on other prompts", "", text, "", ""))
        return found

    def render(self) -> str:
        """For people, as lines."""
        head = ("measure", "base", "LoRA", "difference", "win rate")
        rows = [head, *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            f"{self.run}, step {self.step}: {self.method} on {self.model}; {len(self.prompts)} prompts "
            f"({self.prompts_from}), {self.seeds} seeds; [95 % bootstrap intervals over prompts]"
        ]
        lines += ["  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"not measured: {what}: {why}" for what, why in self.not_measured.items()]
        return "\n".join(lines)


def signed(interval: Interval, digits: int = 3) -> str:
    """With its sign, as differences are read."""
    return f"{interval.value:+.{digits}f} [{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"


def compare_scores(
    name: str, title: str, base: Sequence[float], lora: Sequence[float], prompts: Sequence[Hashable], seed: int = 0
) -> ScorerComparison | None:
    """Base and LoRA scores of the same prompts and seeds; None where the scorer could judge none of them.

    Args:
        name, title: of the scorer.
        base, lora: N scores; a pair with one that is not a number is left out.
        prompts: what each was drawn for; seeds of one prompt are resampled together.
        seed: of the bootstrap.
    """
    triples = list(zip(base, lora, prompts, strict=True))
    known = [(b, a, p) for b, a, p in triples if math.isfinite(b) and math.isfinite(a)]
    if not known:
        return None
    groups = [p for _, _, p in known]
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for b, a, _ in known]

    def mean(values: Sequence[float]) -> Interval:
        return mean_interval(values, groups, seed)

    return ScorerComparison(
        name=name,
        title=title,
        base=mean([b for b, _, _ in known]),
        lora=mean([a for _, a, _ in known]),
        difference=mean([a - b for b, a, _ in known]),
        win_rate=mean(wins),
        pictures=len(known),
    )


def read_evaluation(run: RunDir, step: int | None = None) -> dict[str, Any] | None:
    """What `evaluate_run` wrote, `RunEvaluation.as_dict()`; None where it has not.

    Args:
        run: the run folder.
        step: which checkpoint; None for the highest one measured.
    """
    name = "step_????????" if step is None else f"step_{step:08d}"
    found = sorted(run.evaluation.glob(f"{name}/report.json"))
    return json.loads(found[-1].read_text(encoding="utf-8")) if found else None
