"""The only training loop. `train` reads from top to bottom: prepare, then step, measure, save, answer requests."""

from __future__ import annotations

import math
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .backward import accumulate
from .data_order import Draw, step_groups
from .errors import MapoError, MemoryShortError, TrainingError
from .guarding import check
from .memory import step_or_back, with_less
from .memory_plan import spilled
from .memory_use import free_cached, is_out_of_memory, used_share
from .optimizers import learning_rate_in_use
from .processes import agree, is_lost_process
from .runs import checkpoint_step
from .session import Session, StoppedEarlyError, prepare
from .sharding import main_work
from .validation import draw_samples, export, save_state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor

    from .runs import EventWriter, RequestWatcher, RunDir


def train(run: RunDir, events: EventWriter | None, watcher: RequestWatcher | None) -> None:
    """Train the run in `run` from its newest checkpoint, or from the start, to its last step or a stop request.

    Args:
        run: a folder with config.json and pairs.jsonl.
        events: the run's event writer, in the main process; None in the others.
        watcher: the run's requests, in the main process; None in the others.

    Raises:
        MapoError: settings, pairs or model cannot be trained, or the loss is not finite.
    """
    try:
        session = prepare(run, events, watcher)
        with work_kept(session):
            if session.step == 0 or session.guard.knows_no_start:
                check(session)
            if session.step == 0:
                draw_samples(session)
            loop(session)
            finish(session)
        if session.tracking is not None:
            session.tracking.end()
    except StoppedEarlyError as stopped:
        if events is not None:
            events.emit("run_stopped", 0, message=str(stopped) or NOTHING_TO_SAVE)


NOTHING_TO_SAVE = "Stopped before the first step: there is nothing to save."


# --- the loop --------------------------------------------------------------------------------------------------------


def loop(session: Session) -> None:
    """Step until the last one or until someone wants to stop."""
    config = session.config
    group_size = (
        config.training.train_batch_size
        * config.training.gradient_accumulation_steps
        * session.accelerator.num_processes
    )
    buckets = [session.pairs.bucket(i) for i in session.train_indices]
    groups = step_groups(buckets, group_size, config.seed, skip=session.step)
    every = config.validation
    clock = Clock(session.step)
    session.emit("phase", phase="training")
    while session.step < config.training.steps:
        if answer_requests(session):
            clock = Clock(session.step)  # a pause says nothing of the pace
        if session.step == 0 and agree(session.accelerator, session.wants_stop):
            return
        session.step += 1
        try:
            values = train_step(session, next(groups), buckets)
        except Exception:
            session.step -= 1  # it has not been done
            raise
        stop = values.pop("stop") > 0
        clock.tick(session.step)
        watch_pace(session, clock.latest)
        left = clock.seconds_left(session.step, config.training.steps)
        memory = peak_memory_bytes(session.accelerator.device)
        session.emit(
            "step", steps=config.training.steps, **values, seconds_left=left, seconds_per_step=clock.pace, **memory
        )
        session.guard.note(session.step, values.get("chosen_excess"))
        if is_measured(session, stop) and check(session):
            if stop or session.guard.gave_up:
                return
            groups = step_groups(buckets, group_size, config.seed, skip=session.step)
            clock = Clock(session.step)
            continue
        if every.sample_every_steps and session.step % every.sample_every_steps == 0:
            draw_samples(session)
        if config.checkpoint.every_steps and session.step % config.checkpoint.every_steps == 0:
            save_state(session)
        if stop:
            return


def is_measured(session: Session, stop: bool) -> bool:
    """Whether the held-out pairs are measured after this step: on schedule, at the end, or because the guard asks."""
    every, step = session.config.validation.every_steps, session.step
    if every and step % every == 0:
        return True
    asked = session.guard.next_check is not None and session.guard.next_check <= step
    return not stop and (asked or step == session.config.training.steps)


def train_step(session: Session, group: list[Draw], buckets: list[tuple[int, int]]) -> dict[str, float]:
    """One optimizer step on a group of pairs; its mean loss and metrics, read from the device in one transfer."""
    accelerator = session.accelerator
    sums = with_less(session, lambda: accumulate(session, group, buckets))
    average_gradients(session)
    norm = clip_gradients(session)
    values = collect(session, sums, len(group) // accelerator.num_processes, norm)
    finite = math.isfinite(values["loss"]) and (
        math.isfinite(values["grad_norm"]) or accelerator.scaler is not None  # the scaler skips those by itself
    )
    if finite:
        step_or_back(session)
        if session.average is not None:
            session.average.step(session.parameters)
        session.nonfinite_in_a_row = 0
    else:
        skip_step(session)
    values["learning_rate"] = learning_rate_in_use(session.optimizer, session.schedule)
    session.schedule.step()
    return values


@contextmanager
def work_kept(session: Session) -> Iterator[None]:
    """Where memory runs out for good, or another process is lost: save the state, and say so.

    Raises:
        MemoryShortError, TrainingError: with what is kept.
    """
    kind: type[MapoError] = MemoryShortError
    try:
        yield
        return
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        if session.accelerator.num_processes > 1 and is_lost_process(error):
            kind = TrainingError
            cause = (
                f"Another of the {session.accelerator.num_processes} training processes has ended; {session.run.log} "
                f"says why, if it could. ({cause})"
            )
        elif not isinstance(error, MemoryShortError) and not is_out_of_memory(error):
            raise
    free_cached(session.accelerator.device)
    try:
        if session.step > 0:
            save_state(session)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    newest = session.run.latest_checkpoint()
    kept = f"The state of step {checkpoint_step(newest)} is kept: resume goes on from it." if newest else "No step yet."
    raise kind(f"{cause} {kept}")


def watch_pace(session: Session, latest: list[float]) -> None:
    """Say once that the driver seems to use the computer's memory for the device's."""
    if session.spill_said or not spilled(latest, session.expected_pace, used_share(session.accelerator.device)):
        return
    session.spill_said = True
    session.emit(
        "warning",
        code="memory_spill",
        message=f"Steps take {latest[-1]:.1f} s instead of {session.expected_pace:.1f} s and the device's memory is "
        "nearly full: the driver has probably moved a part of it into the computer's memory. Close other programs that "
        "use the device, or start again with memory.plan set to a smaller size.",
    )


def average_gradients(session: Session) -> None:
    """The mean over the processes, in one transfer; the gradients of a LoRA are small."""
    if session.accelerator.num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in session.parameters]
    flat: Any = session.accelerator.reduce(torch.cat([g.reshape(-1) for g in gradients]), reduction="mean")
    for parameter, part in zip(session.parameters, flat.split([p.numel() for p in session.parameters]), strict=True):
        parameter.grad = part.view_as(parameter)


def clip_gradients(session: Session) -> Tensor:
    """Scale the gradients down to the allowed norm; returns the norm they had."""
    limit = session.config.optimizer.max_grad_norm or math.inf
    norm = session.accelerator.clip_grad_norm_(session.parameters, limit)
    return torch.as_tensor(norm)


def collect(session: Session, sums: dict[str, Tensor], share: int, norm: Tensor) -> dict[str, float]:
    """Means over all processes; the only time in a step that the device is waited for."""
    names = sorted(sums)
    device = session.accelerator.device
    stop = torch.full((), float(session.wants_stop), device=device)  # torch.tensor would wait for the device
    values = torch.stack([*(sums[n].float() / share for n in names), stop, norm.float().to(device)])
    if session.accelerator.num_processes > 1:
        values = session.accelerator.reduce(values, reduction="mean")
    numbers = values.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    return dict(zip([*names, "stop", "grad_norm"], numbers, strict=True))


def skip_step(session: Session) -> None:
    """Leave the weights alone after a loss that is not finite; stop the run after several in a row."""
    session.optimizer.zero_grad(set_to_none=True)
    session.nonfinite_in_a_row += 1
    session.nonfinite_total += 1
    limit = session.config.training.max_nonfinite_steps
    session.emit(
        "warning",
        code="nonfinite",
        message=f"The loss of step {session.step} is not finite; the step is skipped "
        f"({session.nonfinite_in_a_row} in a row, {session.nonfinite_total} in all).",
    )
    if session.nonfinite_in_a_row >= limit:
        raise TrainingError(
            f"The loss was not finite at {limit} steps in a row, last at step {session.step}. The weights of the last "
            "checkpoint are good. Lower optimizer.learning_rate, set training.precision to bf16 or fp32, or give "
            "another model.vae, and resume or start again."
        )


def answer_requests(session: Session) -> bool:
    """Do what was asked through the run folder; a pause lasts until it is taken back or a stop is asked for.

    Returns:
        Whether there was a pause.
    """
    with main_work(session):
        return session.watcher is not None and _answer(session, session.watcher)


def _answer(session: Session, watcher: RequestWatcher) -> bool:
    run = session.run
    save_and_sample(session)
    paused = watcher.pause_requested.is_set()
    if paused:
        if session.step > 0:
            save_state(session)
        message = "Paused until a resume or stop request; save and sample are answered."
        session.emit("paused", message=message)
        run.answer("pause")
        while watcher.pause_requested.is_set() and not session.wants_stop:
            if save_and_sample(session):
                session.emit("paused", message=message)
            time.sleep(0.1)
        session.emit("phase", phase="training")
    return paused


def save_and_sample(session: Session) -> bool:
    """Answer requests for a checkpoint with its LoRA file, and for pictures; whether there was one."""
    watcher, run = session.watcher, session.run
    assert watcher is not None
    wants_save, wants_sample = watcher.take("save"), watcher.take("sample")
    if wants_save:
        if session.step > 0:
            save_state(session)
            lora = export(session, f"{run.name}-{session.step:08d}")
            session.emit("phase", phase="saved", lora=lora, message=f"Saved {lora}.")
        run.answer("save")
    if wants_sample:
        draw_samples(session)
        run.answer("sample")
    return wants_save or wants_sample


def finish(session: Session) -> None:
    """Last measures, pictures, checkpoint and the LoRA file; after a stop without the pictures."""
    if session.step == 0:
        raise StoppedEarlyError(nothing_saved(session))
    with main_work(session) as mine:
        if mine:
            _finish(session)


def _finish(session: Session) -> None:
    done = session.step >= session.config.training.steps
    save_state(session)
    every = session.config.validation
    if done and not (every.sample_every_steps and session.step % every.sample_every_steps == 0):
        draw_samples(session)
    session.emit("phase", phase="writing the LoRA")
    lora = export(session, session.run.name)
    session.emit(
        "run_finished" if done else "run_stopped",
        lora=lora,
        held_out=session.held_out.as_dict() if session.held_out else None,
        held_out_base=session.held_out_base.as_dict() if session.held_out_base else None,
        nonfinite_steps=session.nonfinite_total,
        message=last_words(session, done),
    )


def nothing_saved(session: Session) -> str:
    """Why a run ends without a LoRA."""
    if not session.guard.gave_up:
        return NOTHING_TO_SAVE
    return (
        f"The training moved away from the chosen images {session.guard.rollbacks} times, each time from its very "
        "start: there is nothing to save. Start again with a far lower optimizer.learning_rate or a weaker margin."
    )


def last_words(session: Session, done: bool) -> str:
    """How a run ended."""
    if session.guard.gave_up:
        return (
            f"Stopped by the guard with the LoRA of step {session.step}, its last good state. Start again with a lower "
            "optimizer.learning_rate or a weaker margin."
        )
    return "Finished." if done else f"Stopped after step {session.step}; resume goes on from here."


class Clock:
    """Seconds per step and time left, over the last hundred steps, pictures and measures included."""

    def __init__(self, step: int) -> None:
        self._marks = [(step, time.perf_counter())]
        self.pace = 0.0
        self.latest: list[float] = []  # seconds of the last steps

    def tick(self, step: int) -> None:
        """A step is done."""
        self._marks = [*self._marks[-100:], (step, time.perf_counter())]
        (first, then), (last, now) = self._marks[0], self._marks[-1]
        self.latest = [*self.latest[-4:], now - self._marks[-2][1]]
        self.pace = (now - then) / max(1, last - first)

    def seconds_left(self, step: int, steps: int) -> float:
        """At the present pace."""
        return (steps - step) * self.pace


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """The largest memory use so far: of the CUDA device, or of the process on the CPU."""
    if device.type == "cuda":
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device)}
    try:
        import resource
        import sys
    except ImportError:  # Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_bytes": peak if sys.platform == "darwin" else peak * 1024}
