"""The state of a training: which weights are in use, taking everything that a checkpoint holds, and putting it back.

Two sets of weights exist where a moving average is kept (optimizer.ema_decay) or the optimizer has one of its own
(schedule-free): those that are trained, and the averages, which are in use: measured, drawn, saved as the LoRA,
exported. A checkpoint holds both.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .adapter import adapter_state, load_adapter_state
from .checkpoints import Snapshot
from .evaluate.held_out import HeldOut
from .optimizers import evaluation_weights, has_own_average

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .sections import OptimizerConfig
    from .session import Session


def build_average(parameters: Sequence[torch.nn.Parameter], config: OptimizerConfig) -> Any:
    """The moving average of the weights, diffusers' EMAModel; None where none is wanted.

    Its decay grows with the steps, min(ema_decay, (1 + step) / (10 + step)), so that a short training is not mostly
    its beginning.
    """
    if not config.ema_decay:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=config.ema_decay)


@contextmanager
def weights_in_use(session: Session) -> Iterator[None]:
    """Inside, the parameters are the weights that are measured, drawn and exported; afterwards those of before."""
    if session.average is None:
        with evaluation_weights(session.optimizer, session.parameters):
            yield
        return
    before = [p.detach().clone() for p in session.parameters]
    session.average.copy_to(session.parameters)
    try:
        yield
    finally:
        _set(session.parameters, before)


def take(session: Session) -> Snapshot:
    """Everything that a checkpoint holds, copied."""
    scaler = session.accelerator.scaler
    others = {
        "schedule": session.schedule.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        **session.progress_state(),
    }
    if session.average is not None:
        others["average_steps"] = session.average.optimization_step
    training = None
    if session.average is not None or has_own_average(session.optimizer):
        training = {str(i): p.detach().cpu().clone() for i, p in enumerate(session.parameters)}
    with weights_in_use(session):
        lora = {k: v.detach().cpu().clone() for k, v in adapter_state(session.model).items()}
    return Snapshot.of(session.step, lora, training, session.optimizer.state_dict(), others)


def take_with_good(session: Session) -> Snapshot:
    """As `take`, with the state to which the guard would go back where that is another one."""
    now, good = take(session), session.guard.good
    return now if good is None or good.step == now.step else replace(now, good=good)


def put_back(session: Session, snapshot: Snapshot, with_guard: bool = True) -> None:
    """Make the session what it was; the snapshot stays usable.

    Args:
        session: what to change.
        snapshot: of this run.
        with_guard: what the guard knows, too.

    Raises:
        RunError: it belongs to other settings.
    """
    state = snapshot.others
    load_adapter_state(session.model, snapshot.lora)
    if session.average is not None:
        session.average.shadow_params = [p.detach().clone() for p in session.parameters]
        session.average.optimization_step = state.get("average_steps", 0)
    if snapshot.training is not None:
        _set(session.parameters, [snapshot.training[str(i)] for i in range(len(session.parameters))])
    session.optimizer.load_state_dict(snapshot.optimizer())
    session.schedule.load_state_dict(state["schedule"])
    scaler = session.accelerator.scaler
    if scaler is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    session.step = snapshot.step
    session.nonfinite_total = state["nonfinite_total"]
    session.started_at = state["started_at"]
    session.held_out_base = HeldOut(**state["held_out_base"]) if state["held_out_base"] else None
    session.held_out = HeldOut(**state["held_out"]) if state["held_out"] else None
    if with_guard and state.get("guard"):
        session.guard.load(state["guard"])
        session.guard.good = snapshot.good or snapshot
    session.measured = {int(step): tuple(values) for step, values in state.get("measured", {}).items()}


def begin_from(session: Session, snapshot: Snapshot, with_optimizer: bool) -> None:
    """Begin a new run with the weights of another; its steps, schedule and measures are its own.

    Args:
        session: at step 0.
        snapshot: of the other run.
        with_optimizer: take the optimizer's state, too; the settings stay the new run's.

    Raises:
        RunError: the weights do not fit the new run's settings.
    """
    load_adapter_state(session.model, snapshot.lora)
    if session.average is not None:
        session.average.shadow_params = [p.detach().clone() for p in session.parameters]
    if not with_optimizer:
        return
    if snapshot.training is not None:
        _set(session.parameters, [snapshot.training[str(i)] for i in range(len(session.parameters))])
    fresh, state = session.optimizer.state_dict(), snapshot.optimizer()
    own = ("params", "lr", "initial_lr", "weight_decay", "betas", "eps", "warmup_steps", "d_coef")
    groups = [
        {**before, **{name: group[name] for name in own if name in group}}
        for before, group in zip(state["param_groups"], fresh["param_groups"], strict=True)
    ]
    session.optimizer.load_state_dict({**state, "param_groups": groups})


def _set(parameters: Sequence[torch.nn.Parameter], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
