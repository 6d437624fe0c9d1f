"""The guard at work: measuring, agreeing between the processes, and going back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import checkpoints
from .evaluate.held_out import HeldOutErrors, held_out_errors
from .guard import MIN_PAIRS, Start, Verdict, judge, means
from .sharding import main_work
from .state import put_back, take, weights_in_use
from .validation import measure, save_state

if TYPE_CHECKING:
    from .session import Session

_CALM, _GOOD, _WORSE, _SEVERE = range(4)


def check(session: Session) -> bool:
    """Measure the held-out pairs, and see whether the run has diverged; all processes call it at the same steps.

    Returns:
        Whether the run went back: to an earlier step, with a lower learning rate.
    """
    errors = measure(session)
    guard = session.guard
    if not guard.config.enabled:
        return False
    began = guard.start is None
    with main_work(session) as mine:
        verdict = _judged(session, errors) if mine else None
    if began:
        _share_start(session)
        guard.last_check = session.step
        guard.good = take(session)
        return False
    code = _CALM
    if verdict is not None:
        code = _SEVERE if verdict.severe else _WORSE if verdict.worse else _GOOD if verdict.good else _CALM
    code = _agree(session, code)
    seen = verdict or Verdict(0.0, 0.0, 0.0, code >= _WORSE, code == _SEVERE, code == _GOOD)
    last = session.step >= session.config.training.steps
    if not guard.weigh(session.step, seen, last):
        if code == _GOOD:
            guard.good = take(session)
        elif verdict is not None and verdict.worse:
            session.emit("warning", code="chosen_error_rises", message=f"{_words(verdict)}. Measured again soon.")
        return False
    _go_back(session, seen)
    return True


def _judged(session: Session, errors: HeldOutErrors | None) -> Verdict | None:
    """The verdict on a measurement; None for the first, which the others are compared with."""
    guard, now = session.guard, _with_training_pairs(session, errors)
    if now is None:
        return None
    if guard.start is None:
        guard.start = now
        return None
    return judge(guard.start, now, guard.config.tolerance, guard.config.z)


def _with_training_pairs(session: Session, errors: HeldOutErrors | None) -> Start | None:
    """The measurement; where there are few held-out pairs, some training pairs are measured with them."""
    missing = MIN_PAIRS - len(session.held_out_indices)
    more = [session.train_indices[i] for i in range(min(missing, len(session.train_indices)))]
    found = means(errors) if errors is not None else None
    if not more:
        return found
    with session.autocast(), weights_in_use(session):
        extra = means(
            held_out_errors(
                session.model,
                session.family,
                session.pairs,
                more,
                draws=session.config.validation.draws,
                seed=session.config.seed,
                batch_size=session.config.training.train_batch_size,
            )
        )
    if found is None:
        return extra
    share = len(found.chosen) / (len(found.chosen) + len(extra.chosen))
    levels = [share * a + (1 - share) * b for a, b in zip(found.levels, extra.levels, strict=True)]
    return Start(found.chosen + extra.chosen, found.margin + extra.margin, levels)


def _share_start(session: Session) -> None:
    """Every process watches its share of the training with the same yardstick."""
    if session.accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        session.guard.start = broadcast_object_list([session.guard.start])[0]


def _agree(session: Session, code: int) -> int:
    """What the main process found, in all processes."""
    if session.accelerator.num_processes == 1:
        return code
    found = torch.tensor(float(code), device=session.accelerator.device)
    return round(session.accelerator.reduce(found, reduction="sum").item())  # pyright: ignore[reportAttributeAccessIssue]


def _go_back(session: Session, verdict: Verdict) -> None:
    """Put the last good state back, with a lower learning rate; after too many times the run is to end there."""
    guard, good, left = session.guard, session.guard.good, session.step
    assert good is not None
    guard.went_back()
    put_back(session, good, with_guard=False)
    guard.last_check = session.step
    guard.gave_up = guard.rollbacks > guard.config.max_rollbacks
    if not guard.gave_up:
        lower_learning_rate(session, guard.config.learning_rate_factor)
    rate = session.schedule.base_lrs[0]
    then = (
        f"It ends here, after {guard.config.max_rollbacks} returns; start again with a lower "
        "optimizer.learning_rate or a weaker margin"
        if guard.gave_up
        else f"The learning rate is lowered to {rate:g}"
    )
    session.emit(
        "rolled_back",
        from_step=left,
        reason="chosen_error_rises",
        rise=verdict.rise,
        margin_rise=verdict.margin_rise,
        rollbacks=guard.rollbacks,
        learning_rate=rate,
        message=f"{_words(verdict)}. Back from step {left} to step {session.step}. {then}.",
    )
    guard.good = take(session)
    if session.accelerator.is_main_process:
        checkpoints.drop_after(session.run, session.step)
        if session.step > 0 or session.run.list_checkpoints():
            save_state(session, replace=True)


def lower_learning_rate(session: Session, factor: float) -> None:
    """Multiply the learning rate of the whole schedule from here on."""
    schedule = session.schedule
    schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
    schedule._last_lr = [rate * factor for rate in schedule._last_lr]
    for group in session.optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor


def _words(verdict: Verdict) -> str:
    margin = "while the margin rises" if verdict.margin_rise > 0 else "and the margin does not rise either"
    return (
        f"The error on fixed chosen images is {verdict.rise:+.0%} against the start (noise {verdict.band:.0%}), "
        f"{margin}: the LoRA is moving away from them"
    )
