"""The divergence guard: notices that a run moves away from the chosen images, and takes it back.

Preference training can diverge: the margin goes on rising because the error on rejected images rises without limit,
while the error on chosen images, which should fall, rises with it, and the pictures turn to noise. What decides is
measured on the same pairs at the same noise every time, so that its noise is that of the pairs alone:

    d_i = K_w of pair i now - K_w of pair i at the start        (means over the fixed timesteps)
    worse: mean(d) > tolerance * mean K_w at the start, and mean(d) > z * sd(d) / sqrt(pairs), and the margin has risen

A rise of five times the tolerance counts whatever the margin does. Between the measurements the training's own K_w is
watched, over that of the start at the same noise level; it is noisy, so it only brings the next measurement forward.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from .batch import PairBatch
    from .checkpoints import Snapshot
    from .evaluate.held_out import HeldOutErrors
    from .sections import GuardConfig

MIN_PAIRS = 8  # below this the held-out pairs are joined by training pairs; a deviation needs some pairs to be known
SEVERE = 5.0  # times the tolerance


@dataclass(frozen=True)
class Start:
    """What the guard compares with: the weights that the run began with, each list one entry per pair.

    Attributes:
        chosen, margin: means over the timesteps.
        levels: mean log K_w at each of the fixed timesteps, for what is seen while training.
    """

    chosen: list[float]
    margin: list[float]
    levels: list[float]


@dataclass(frozen=True)
class Verdict:
    """What a measurement says.

    Attributes:
        rise: of the chosen error over the start's, relative.
        band: z standard errors of that rise, relative.
        margin_rise: change of the mean margin.
        worse: the run has diverged, if the next measurements say so, too.
        severe: it has, whatever they will say.
        good: well inside the band; a state to go back to.
    """

    rise: float
    band: float
    margin_rise: float
    worse: bool
    severe: bool
    good: bool


def means(errors: HeldOutErrors) -> Start:
    """The numbers of a measurement that the guard needs."""
    pairs = sorted(set(errors.pairs))
    of = {p: [i for i, q in enumerate(errors.pairs) if q == p] for p in pairs}
    at = [[i for i, d in enumerate(errors.draw) if d == n] for n in range(errors.draws)]

    def mean(values: Sequence[float], places: list[int]) -> float:
        return sum(values[i] for i in places) / len(places)

    logs = [math.log(max(c, 1e-12)) if math.isfinite(c) else math.inf for c in errors.chosen]
    return Start(
        [mean(errors.chosen, of[p]) for p in pairs],
        [mean(errors.rejected, of[p]) - mean(errors.chosen, of[p]) for p in pairs],
        [mean(logs, places) for places in at],
    )


def judge(start: Start, now: Start, tolerance: float, z: float) -> Verdict:
    """Compare a measurement with that of the start, pair by pair.

    Args:
        start: of the weights that the run began with.
        now: of the same pairs at the same noise.
        tolerance: relative rise of the chosen error that is allowed.
        z: standard errors that a rise must exceed.
    """
    reference = sum(start.chosen) / len(start.chosen)
    changes = [(n - s) / reference for n, s in zip(now.chosen, start.chosen, strict=True)]
    count, rise = len(changes), sum(changes) / len(changes)
    margin_rise = sum(n - s for n, s in zip(now.margin, start.margin, strict=True)) / count
    if not math.isfinite(rise):
        return Verdict(math.inf, 0.0, margin_rise, worse=True, severe=True, good=False)
    spread = math.sqrt(sum((c - rise) ** 2 for c in changes) / max(1, count - 1))
    band = z * spread / math.sqrt(count)
    severe = rise > max(SEVERE * tolerance, band)
    worse = severe or (rise > max(tolerance, band) and margin_rise > 0)
    return Verdict(rise, band, margin_rise, worse, severe, good=rise <= max(tolerance / 2, min(band, tolerance)))


@dataclass
class Guard:
    """What the guard of a run knows; all of it but `good` goes into checkpoints as JSON.

    Attributes:
        config: the settings.
        start: None until the first measurement.
        bad_in_a_row: measurements that were worse.
        rollbacks: how often the run went back.
        next_check: step at which to measure before it is due, or None.
        wait: steps from one such measurement to the next at least; doubles with every one that found nothing.
        last_check: step of the last measurement.
        window: the last values of the training's chosen error.
        lowest: mean and variance of the window with the lowest mean.
        good: the state to go back to.
    """

    config: GuardConfig
    start: Start | None = None
    bad_in_a_row: int = 0
    rollbacks: int = 0
    next_check: int | None = None
    wait: int = 0
    last_check: int = 0
    window: deque[float] = field(default_factory=deque)
    lowest: tuple[float, float] | None = None
    good: Snapshot | None = None
    gave_up: bool = False

    @property
    def knows_no_start(self) -> bool:
        """Whether there is nothing to compare with; where a run began without a guard, its present state is taken."""
        return self.config.enabled and self.start is None

    def state(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "start": asdict(self.start) if self.start else None,
            "bad_in_a_row": self.bad_in_a_row,
            "rollbacks": self.rollbacks,
            "next_check": self.next_check,
            "wait": self.wait,
            "last_check": self.last_check,
            "window": list(self.window),
            "lowest": list(self.lowest) if self.lowest else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""
        self.start = Start(**state["start"]) if state["start"] else None
        for name in ("bad_in_a_row", "rollbacks", "next_check", "wait", "last_check"):
            setattr(self, name, state[name])
        self.window = deque(state["window"])
        self.lowest = tuple(state["lowest"]) if state["lowest"] else None

    def excess(self, errors: dict[str, Tensor], batch: PairBatch, timesteps: int) -> dict[str, Tensor]:
        """log K_w over that of the start at the same noise level, [B]; nothing before the first measurement."""
        if not self.config.enabled or self.start is None or "chosen_mse" not in errors:
            return {}
        levels, count = self.start.levels, len(self.start.levels)
        known = []
        for level in batch.levels[: len(errors["chosen_mse"])]:
            place = min(max(level / timesteps * count - 0.5, 0.0), count - 1.0)
            low = min(int(place), max(0, count - 2))
            high = min(low + 1, count - 1)
            known.append(levels[low] + (place - low) * (levels[high] - levels[low]))
        error = errors["chosen_mse"].detach().float()
        return {"chosen_excess": error.clamp_min(1e-12).log() - torch.tensor(known, device=error.device)}

    def note(self, step: int, excess: float | None) -> None:
        """See a step's value; asks for a measurement where the last ones are clearly above the lowest ones."""
        if excess is None or not math.isfinite(excess):
            return
        size = self.config.window_steps
        self.window.append(excess)
        while len(self.window) > size:
            self.window.popleft()
        if len(self.window) < size:
            return
        mean = sum(self.window) / size
        variance = sum((v - mean) ** 2 for v in self.window) / max(1, size - 1)
        if self.lowest is None or mean < self.lowest[0]:
            self.lowest = (mean, variance)
            return
        gap = mean - self.lowest[0]
        # The lowest of many windows is some two standard errors below the others by chance alone.
        band = (self.config.z + 2) * math.sqrt((variance + self.lowest[1]) / size)
        due = step - self.last_check >= max(self.wait, size)
        if due and gap > max(math.log1p(2 * self.config.tolerance), band):
            self.next_check = step
            self.wait = 2 * max(self.wait, size)

    def weigh(self, step: int, verdict: Verdict, last: bool) -> bool:
        """Count a measurement; whether the run is to go back. A last one has no second to wait for."""
        self.last_check, self.next_check = step, None
        self.bad_in_a_row = self.bad_in_a_row + 1 if verdict.worse else 0
        if verdict.worse and not (verdict.severe or last) and self.bad_in_a_row < self.config.patience:
            self.next_check = step + self.config.window_steps
            return False
        return verdict.worse

    def went_back(self) -> None:
        """Begin anew from the good state."""
        self.rollbacks += 1
        self.bad_in_a_row, self.next_check, self.wait = 0, None, 0
        self.window.clear()
        self.lowest = None
