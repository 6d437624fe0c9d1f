"""The per-pair view of a run: which pairs it has learned, which resist, and which hurt the held-out pairs.

Every pair is measured with the base model and at the kept checkpoints, at fixed noise and timesteps that are the same
for all of them: accuracy is the share of timesteps at which the chosen image is predicted with the smaller error, the
margin is the mean of K_l - K_w. Errors differ by orders of magnitude between timesteps, and with them what training can
change; so that no timestep decides alone, a pair's gain is the change of its margin over the base model's mean error at
the same timestep, mean over the timesteps.

Whether a pair hurts is estimated at one checkpoint as by TracIn (Pruthi et al., arXiv 2002.08484, with one checkpoint
and without the optimizer's scaling), on the trained weights alone: g_i is the gradient of pair i's K_w - K_l, h that of
the held-out pairs' mean, so a small step along -g_i, which prefers this pair's chosen image more, changes their margin
by the step size times <g_i, h>. Not the gradient of the method's whole loss: its part that lowers K_w
alone lowers K_l of similar pictures, too, and makes good pairs look harmful. It is a first-order estimate from a few
noise draws: a hint which pictures to look at, not a proof.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch

from .adapter import load_adapter_state
from .batch import assemble, pair_errors
from .checkpoints import load_checkpoint
from .errors import RunError
from .evaluate.held_out import HeldOutErrors, fixed_randomness, held_out_errors
from .runs import checkpoint_step, nulls_for_nonfinite, write_atomic
from .session import prepare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from .runs import RunDir
    from .session import Session

Class = Literal["learned", "resisted", "harmful", "undecided"]
T = TypeVar("T")
NEEDS = frozenset({"chosen_mse", "rejected_mse"})
MAX_HELD_OUT = 32
SURE = 2.0  # standard errors over the draws from which a change or an influence is believed


@dataclass(frozen=True)
class PairView:
    """One pair.

    Attributes:
        index: its line in the run's pairs.jsonl, from 0; what `continue_run` takes.
        prompt, chosen, rejected: as there.
        held_out: it was not trained on.
        accuracy, margin, chosen_mse: one value per step of the inspection.
        gain: of the margin from the base model to the last step, as a share of the base model's mean error at each
            timestep, mean over the timesteps.
        gain_error: standard error of that, over the timesteps.
        influence: cosine of the gradients of its margin and of the held-out pairs' margin, -1 to 1; below 0 preferring
            its chosen image lowers theirs. None where it was not estimated.
        influence_error: standard error of that, over the draws.
        verdict: "harmful": its influence is negative; "resisted": its margin fell, or is still negative, and it did
            not gain; "learned": its margin rose; "undecided": none of these beyond its noise.
    """

    index: int
    prompt: str
    chosen: str
    rejected: str
    held_out: bool
    accuracy: list[float]
    margin: list[float]
    chosen_mse: list[float]
    gain: float
    gain_error: float
    influence: float | None
    influence_error: float | None
    verdict: Class


@dataclass(frozen=True)
class Inspection:
    """The per-pair view of a run; `inspection/step_XXXXXXXX.json` in its folder.

    Attributes:
        run: its name.
        steps: 0, which is the base model, and the checkpoints that were measured.
        draws: fixed timesteps per pair.
        pairs: the pairs, those to look at first in front.
        all_pairs: how many the run has; `pairs` may be a sample.
        how: how it was computed, for people.
    """

    run: str
    steps: list[int]
    draws: int
    pairs: list[PairView]
    all_pairs: int
    how: str

    def as_dict(self) -> dict[str, Any]:
        """As stored."""
        return asdict(self)

    def render(self, count: int = 10) -> str:
        """The classes and the pairs to look at, as text."""
        numbers = {c: sum(p.verdict == c for p in self.pairs) for c in ("learned", "resisted", "harmful", "undecided")}
        lines = [f"{self.run}, step {self.steps[-1]}: " + ", ".join(f"{n} {c}" for c, n in numbers.items())]
        lines += ["", f"{'pair':>5}  {'class':<10} {'accuracy':>13} {'margin':>19} {'influence':>10}  prompt"]
        for p in self.pairs[:count]:
            influence = "" if p.influence is None else f"{p.influence:+.2f}"
            lines.append(
                f"{p.index:>5}  {p.verdict:<10} {p.accuracy[0]:>5.2f} -> {p.accuracy[-1]:>4.2f} "
                f"{p.margin[0]:>+8.4f} -> {p.margin[-1]:>+7.4f} {influence:>10}  {p.prompt[:48]}"
                + (" (held out)" if p.held_out else "")
            )
        return "\n".join([*lines, "", self.how])


def inspect_run(
    run: RunDir,
    *,
    step: int | None = None,
    draws: int = 8,
    max_pairs: int = 256,
    max_checkpoints: int = 5,
    influence_pairs: int = 48,
    influence_draws: int = 6,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Inspection:
    """Measure the pairs of a run one by one; the result is stored in its folder, with a sheet of the pairs to look at.

    It costs (checkpoints + 1) x pairs x draws predictions of both images, and for the influence a forward and backward
    pass for each draw of its pairs and of at most 32 held-out ones.

    Args:
        run: the run; images and prompts come from the cache.
        step: the last checkpoint to look at; None for the newest.
        draws: fixed timesteps per pair.
        max_pairs: of a larger set so many are measured, spread evenly over it.
        max_checkpoints: of more checkpoints so many are measured, the last and others spread over the rest.
        influence_pairs: training pairs whose influence is estimated, those with the smallest gain; 0 for none.
        influence_draws: noise draws for each of them.
        progress: what is being done, how much of how much is done.

    Raises:
        RunError: there is no such checkpoint.
    """
    paths = checkpoints_of(run, step, max_checkpoints)
    session = prepare(run, None, None)
    places = spread([*session.train_indices, *session.held_out_indices], max_pairs)
    measured: list[HeldOutErrors] = []
    for number, path in enumerate([None, *paths]):
        if path is not None:
            load_adapter_state(session.model, load_checkpoint(path).lora)
        what = "measuring pairs, base model" if path is None else f"measuring pairs, step {checkpoint_step(path)}"
        with session.autocast():
            measured.append(
                held_out_errors(
                    session.model,
                    session.family,
                    session.pairs,
                    places,
                    draws=draws,
                    seed=session.config.seed,
                    batch_size=session.config.training.train_batch_size,
                    base=number == 0,
                    progress=lambda done, total, what=what: progress(what, done, total),
                )
            )
    curves = [by_pair(errors) for errors in measured]
    scales = level_scales(measured[0])
    shares = [{p: over(c[p][2], scales) for p in places} for c in (curves[0], curves[-1])]
    gains = {p: mean_and_error([b - a for a, b in zip(shares[0][p], shares[1][p], strict=True)]) for p in places}
    held = set(session.held_out_indices)
    suspects = sorted((p for p in places if p not in held), key=lambda p: gains[p][0])[:influence_pairs]
    influences = influence_on_held_out(session, suspects, influence_draws, progress) if suspects else {}
    last = {p: sum(shares[1][p]) / draws for p in places}
    views = [view(session, p, curves, gains[p], last[p], influences.get(p)) for p in places]
    found = Inspection(
        run=run.name,
        steps=[0, *(checkpoint_step(p) for p in paths)],
        draws=draws,
        pairs=sorted(views, key=suspicion),
        all_pairs=len(session.pairs.entries),
        how=explanation(session, draws, influences, influence_draws, checkpoint_step(paths[-1])),
    )
    store(run, found)
    return found


def checkpoints_of(run: RunDir, step: int | None, count: int) -> list[Path]:
    """The checkpoints up to `step`, at most `count`, the last one among them.

    Raises:
        RunError: there is none.
    """
    paths = [p for p in run.list_checkpoints() if checkpoint_step(p) > 0]
    there = ", ".join(str(checkpoint_step(p)) for p in paths) or "none"
    if step is not None:
        paths = [p for p in paths if checkpoint_step(p) <= step]
    if not paths or (step is not None and checkpoint_step(paths[-1]) != step):
        raise RunError(f"Run {run.name} has no checkpoint{'' if step is None else f' of step {step}'}; it has {there}.")
    return [*spread(paths[:-1], count - 1), paths[-1]]


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spread over them."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def by_pair(errors: HeldOutErrors) -> dict[int, tuple[float, float, list[float]]]:
    """Pair -> accuracy, mean K_w, and its margins by timestep."""
    found: dict[int, list[tuple[int, float, float]]] = {}
    for pair, draw, chosen, rejected in zip(errors.pairs, errors.draw, errors.chosen, errors.rejected, strict=True):
        found.setdefault(pair, []).append((draw, chosen, rejected))
    return {
        pair: (
            sum(c < r for _, c, r in rows) / len(rows),
            sum(c for _, c, _ in rows) / len(rows),
            [r - c for _, c, r in sorted(rows)],
        )
        for pair, rows in found.items()
    }


def level_scales(base: HeldOutErrors) -> list[float]:
    """The base model's mean error at each of the timesteps, over all pairs and both of their images."""
    found = []
    for level in range(base.draws):
        errors = [(c + r) / 2 for c, r, d in zip(base.chosen, base.rejected, base.draw, strict=True) if d == level]
        found.append(max(sum(errors) / len(errors), 1e-12))
    return found


def over(values: Sequence[float], scales: Sequence[float]) -> list[float]:
    """Values by timestep over those of the base model."""
    return [value / scale for value, scale in zip(values, scales, strict=True)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error; of one value alone nothing is known of the error."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def classify(gain: float, gain_error: float, last_margin: float, influence: tuple[float, float] | None) -> Class:
    """The class of a pair; see `PairView.verdict`."""
    if influence is not None and influence[0] < -SURE * influence[1]:
        return "harmful"
    if gain > SURE * gain_error:
        return "learned"
    if gain < -SURE * gain_error or (gain <= 0 and last_margin < 0):
        return "resisted"
    return "undecided"


def suspicion(pair: PairView) -> tuple[int, float]:
    """Order of the pairs: harmful, resisted, undecided, learned; within each the worst first."""
    order = ("harmful", "resisted", "undecided", "learned").index(pair.verdict)
    return order, pair.influence if pair.verdict == "harmful" and pair.influence is not None else pair.gain


def view(
    session: Session,
    place: int,
    curves: Sequence[dict[int, tuple[float, float, list[float]]]],
    gain: tuple[float, float],
    last: float,
    influence: tuple[float, float] | None,
) -> PairView:
    """All about one pair; `last` is its margin at the last step in the unit of its gain."""
    pair = session.source_pairs[place]
    margins = [sum(c[place][2]) / len(c[place][2]) for c in curves]
    return PairView(
        index=place,
        prompt=pair.prompt,
        chosen=str(pair.chosen),
        rejected=str(pair.rejected),
        held_out=place in set(session.held_out_indices),
        accuracy=[c[place][0] for c in curves],
        margin=margins,
        chosen_mse=[c[place][1] for c in curves],
        gain=gain[0],
        gain_error=gain[1],
        influence=influence[0] if influence else None,
        influence_error=influence[1] if influence else None,
        verdict=classify(*gain, last, influence),
    )


# --- influence -------------------------------------------------------------------------------------------------------


def influence_on_held_out(
    session: Session, places: Sequence[int], draws: int, progress: Callable[[str, int, int], None]
) -> dict[int, tuple[float, float]]:
    """Pair -> cosine of its gradient with the one that raises the held-out margin, and the standard error of that.

    The weights are those that the session has; its gradients are left empty.
    """
    if not session.held_out_indices:
        return {}
    shown = spread(session.held_out_indices, MAX_HELD_OUT)
    toward = torch.stack([margin_gradient(session, place, d, draws) for place in shown for d in range(draws)]).mean(0)
    found: dict[int, tuple[float, float]] = {}
    for done, place in enumerate(places):
        own = [margin_gradient(session, place, d, draws) for d in range(draws)]
        found[place] = mean_and_error([torch.cosine_similarity(g, toward, dim=0).item() for g in own])
        progress("comparing gradients with the held-out pairs", done + 1, len(places))
    return found


def margin_gradient(session: Session, place: int, draw: int, draws: int) -> Tensor:
    """The gradient of a pair's K_w - K_l at one fixed timestep and noise; [all trained weights], on the device."""
    total = session.model.noise_scheduler.config.num_train_timesteps
    randomness = fixed_randomness(session.pairs, place, draw, draws, total, session.config.seed)
    batch = assemble(session.pairs, [place], [randomness], session.model, session.family, paired=True)
    with session.autocast():
        errors = pair_errors(session.model, session.family, batch, NEEDS)
    session.accelerator.backward((errors["chosen_mse"] - errors["rejected_mse"]).sum())
    found = _gradient(session)
    _clear(session)
    return found


def _gradient(session: Session) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).detach().float().reshape(-1) for p in session.parameters]
    )


def _clear(session: Session) -> None:
    for parameter in session.parameters:
        parameter.grad = None


# --- files -----------------------------------------------------------------------------------------------------------


def explanation(session: Session, draws: int, influences: dict[int, Any], influence_draws: int, step: int) -> str:
    """How it was computed, in words."""
    text = (
        f"Margins: mean of K_l - K_w at {draws} fixed timesteps, the same noise for every step. Classes: by the change "
        "of the margin over the base model's error at the same timestep."
    )
    if influences:
        text += (
            f" Influence: cosine of the gradient of the pair's own margin with that of the margin of "
            f"{min(MAX_HELD_OUT, len(session.held_out_indices))} held-out pairs, at step {step}, mean of "
            f"{influence_draws} noise draws, for the {len(influences)} training pairs that gained least; a first-order "
            "estimate."
        )
    return text


def store(run: RunDir, found: Inspection) -> None:
    """Write the JSON and the sheet into the run's folder."""
    from .pairs import open_pairs
    from .pictures import pair_sheet, save_image

    folder = run.path / "inspection"
    folder.mkdir(exist_ok=True)
    name = f"step_{found.steps[-1]:08d}"
    pairs = open_pairs(run.pairs)
    shown = found.pairs if len(found.pairs) <= 8 else [*found.pairs[:5], *found.pairs[-3:]]
    titled = [pairs[p.index].model_copy(update={"prompt": f"{p.index} {p.verdict}: {p.prompt}"}) for p in shown]
    save_image(pair_sheet(titled), folder / f"{name}.png")
    write_atomic(folder / f"{name}.json", json.dumps(nulls_for_nonfinite(found.as_dict())) + "\n")
