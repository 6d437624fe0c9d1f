"""The memory of a run: decided and measured before training, and saved one rung further when it runs out.

The order of the savings and what each costs are in `memory_plan.RUNGS`. Nothing here changes which pairs a step shows,
with which noise; of the rungs only 8-bit Adam and a base in fewer bits change the arithmetic. Every rung is an event.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from .backward import accumulate
from .base_weights import base_bytes, base_prediction, place_base, relative_error
from .batch import assemble
from .data_order import Draw
from .devices import DTYPES
from .errors import MemoryShortError
from .memory_plan import (
    GIB,
    PLAIN_ROOM,
    Decision,
    budget_of,
    next_rung,
    open_checkpointing,
    read_decision,
    room_for,
    with_plan,
    write_decision,
)
from .memory_predict import plain_step_bytes
from .memory_use import PeakMemory, available_bytes, free_cached, is_out_of_memory, machine_name, tensor_share
from .noising import draw_randomness
from .sharding import SharedBase, require_plain
from .speed import set_checkpointing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from .families.base import DiffusionModel, Family
    from .memory_plan import Plan, Rung
    from .session import Session

BASE = ("base_precision", "offload")  # rungs that change where the base lies
NEARLY_FULL = 0.85  # share of the device's memory
_ALWAYS_COPIED_BYTES = 2**28
Result = TypeVar("Result")


@dataclass(frozen=True)
class Measured:
    """What two steps of the largest pictures took.

    Attributes:
        peak_memory_bytes: at most, of the device or of the process; None if memory ran out.
        seconds_per_step: of the second step.
    """

    peak_memory_bytes: int | None
    seconds_per_step: float | None

    def as_dict(self) -> dict[str, Any]:
        """For events."""
        return {"peak_memory_bytes": self.peak_memory_bytes, "seconds_per_step": self.seconds_per_step}


# --- before training -------------------------------------------------------------------------------------------------


def settle(session: Session, rebuild: Callable[[Session], None]) -> None:
    """Bring the base to its device and find the plan with which a step fits; all other state stays as it was.

    A decision in the run folder is taken over as it is, so that a resumed run does the same; on another machine it is
    where the search begins.

    Args:
        session: with its LoRA on, not restored yet.
        rebuild: makes optimizer and schedule anew from `session.config`.

    Raises:
        MemoryShortError: it does not fit whatever is saved.
    """
    before = read_decision(session.run)
    machine = machine_name(session.accelerator.device)
    if before is not None and before.machine != machine:
        session.emit(
            "warning",
            code="other_machine",
            message=f"This run was measured on another machine ({before.machine}); now it is {machine}. It goes on "
            "with the same savings, and with further ones if they are needed.",
        )
    rungs = list(before.rungs) if before else []
    _place(session, rungs)
    if before is not None and before.machine == machine:
        session.expected_pace = before.seconds_per_step or 0.0
        return
    left_open = session.asked.training.gradient_checkpointing is None
    if before is None and left_open and can_predict(session):
        try_without_checkpointing(session)
    measured = _search(session, rungs, rebuild) if _wanted(session) else None
    if rungs or measured is not None or session.base_error is not None or left_open:
        figures = measured.as_dict() if measured else {}
        keep_decision(session, Decision(plan=session.plan, machine=machine, rungs=tuple(rungs), **figures))


def _wanted(session: Session) -> bool:
    asked = session.asked.memory.preflight
    return asked == "on" or (asked == "auto" and session.accelerator.device.type == "cuda")


def _search(session: Session, rungs: list[str], rebuild: Callable[[Session], None]) -> Measured:
    """Measure, and add savings until it fits."""
    step: tuple[Rung, Measured] | None = None
    while True:
        session.emit("phase", phase="measuring memory and speed")
        budget = budget_for(session)
        found = worst(session, measure_steps(session))
        rebuild(session)
        if step is not None:
            _say_rung(session, step[0], step[1], found)
        room = room_for(session.plan, session.asked) * budget
        fits = found.peak_memory_bytes is not None and found.peak_memory_bytes <= room
        if fits or session.asked.memory.plan == "manual":
            _say_plan(session, found, budget, rungs, fits)
            return found
        rung = _down(session, found, budget=budget)
        step = (rung, found)
        rungs.append(rung.name)
        if rung.needs in BASE:
            _place(session, rungs)
        rebuild(session)


def can_predict(session: Session) -> bool:
    """Whether the plan is to decide about gradient checkpointing, and memory here can be counted beforehand.

    With a shared base a pass has to be made by all processes alike, and what it fetches would be counted as kept.
    """
    device = session.accelerator.device.type
    return open_checkpointing(session.asked) and session.shared is None and device in ("cpu", "cuda")


def try_without_checkpointing(session: Session) -> None:
    """Switch gradient checkpointing off where a step is predicted to leave room without it, and on where not.

    A step that does not fit need not be tried for it, which on the CPU could end the process.
    """
    config, budget = session.config.training, budget_for(session)
    buckets = [session.pairs.bucket(i) for i in session.train_indices]
    draws = [Draw(0, worst_pair(session, buckets))] * config.train_batch_size
    try:
        needed = plain_step_bytes(session, draws)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        needed = 2 * budget
    free_cached(session.accelerator.device)
    needed = int(_of_all(session, [needed], largest=True)[0])
    on = needed > PLAIN_ROOM * budget
    apply_plan(session, session.plan.model_copy(update={"gradient_checkpointing": on}))
    session.emit(
        "phase",
        phase="gradient checkpointing",
        gradient_checkpointing=on,
        predicted_bytes=needed,
        budget_bytes=budget,
        message=f"Without gradient checkpointing a step would take about {needed / GIB:.2f} GiB of "
        f"{budget / GIB:.2f} GiB: it is {'on' if on else 'off'}.",
    )


def budget_for(session: Session) -> int:
    """Bytes that every process of the run may take: of the one that has least."""
    own = budget_of(session.asked.memory.plan, available_bytes(session.accelerator.device))
    return int(_of_all(session, [own], largest=False)[0])


def measure_steps(session: Session, steps: int = 2) -> Measured:
    """Peak memory and pace of real steps on the largest pictures with the longest prompt; weights stay as they are.

    A step here has at most two batches, because a third takes no more memory; the time is that of all of them.
    """
    config, device = session.config, session.accelerator.device
    batch, passes = config.training.train_batch_size, config.training.gradient_accumulation_steps
    buckets = [session.pairs.bucket(i) for i in session.train_indices]
    shown = min(passes, 2) * batch * session.accelerator.num_processes
    group = [Draw(0, worst_pair(session, buckets))] * shown
    weights = [p.detach().clone() for p in session.parameters]
    scaler = session.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else None
    random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    times: list[float] = []
    enough = True
    peak = PeakMemory(device)
    try:
        with peak:
            for _ in range(steps):
                began = time.perf_counter()
                session.optimizer.zero_grad(set_to_none=True)
                accumulate(session, group, buckets)
                session.accelerator.clip_grad_norm_(session.parameters, 1.0)
                session.optimizer.step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append((time.perf_counter() - began) * passes / min(passes, 2))
    except Exception as error:
        if not is_out_of_memory(error) or session.shared is not None:
            raise  # the others are in the middle of a pass, and nobody can say where
        enough = False
    session.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, old in zip(session.parameters, weights, strict=True):
            parameter.copy_(old)
    if scaler is not None and scale is not None:
        scaler.load_state_dict(scale)
    torch.set_rng_state(random[0])
    if random[1] is not None:
        torch.cuda.set_rng_state(random[1], device)
    free_cached(device)
    return Measured(peak.reserved_bytes, times[-1]) if enough else Measured(None, None)


def worst_pair(session: Session, buckets: Sequence[tuple[int, int]]) -> int:
    """The training pair, by its place in `train_indices`, with the most pixels and, of a thousand such, the longest
    prompt.
    """
    pixels = [width * height for width, height in buckets]
    most = max(pixels)
    largest = [n for n, size in enumerate(pixels) if size == most][:1000]
    return max(largest, key=lambda n: len(session.pairs.entries[session.train_indices[n]].prompt))


def worst(session: Session, found: Measured) -> Measured:
    """The largest of all processes' figures, so that all decide the same."""
    if session.accelerator.num_processes == 1:
        return found
    failed = math.inf  # memory ran out there
    peak, pace = _of_all(session, [found.peak_memory_bytes or failed, found.seconds_per_step or failed], largest=True)
    return Measured(None, None) if math.inf in (peak, pace) else Measured(int(peak), pace)


def _of_all(session: Session, values: Sequence[float], *, largest: bool) -> list[float]:
    """The largest or the smallest of all processes' values, so that all decide the same."""
    if session.accelerator.num_processes == 1:
        return list(values)
    own = torch.tensor(values, dtype=torch.float64, device=session.accelerator.device)
    every: Any = session.accelerator.gather(own[None])
    return (every.amax(0) if largest else every.amin(0)).tolist()


# --- encoding and class images ---------------------------------------------------------------------------------------


def with_smaller_vae(model: DiffusionModel, encode: Callable[[], Result], warn: Callable[[str], Any]) -> Result:
    """Encode; where memory runs out one image at a time, then in tiles. What was encoded before is in the cache.

    Raises:
        MemoryShortError: the encoders themselves do not fit.
    """
    vae: Any = model.vae
    ways: tuple[tuple[Any, str], ...] = (
        (lambda: None, ""),
        (vae.enable_slicing, "Memory ran out while encoding: now one image at a time."),
        (vae.enable_tiling, "Memory ran out while encoding: large images are now encoded in tiles, which can show."),
    )
    for prepare, message in ways:
        prepare()
        if message:
            warn(message)
        try:
            return encode()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_cached(next(vae.parameters()).device)
    raise MemoryShortError(
        "The images or prompts cannot be encoded: memory runs out even in tiles. What is encoded is kept. Close other "
        "programs that use the device, or lower data.resolution, and start again."
    )


def room_to_draw(unet: nn.Module, device: torch.device) -> None:
    """Bring the denoiser, in full, to the device for pictures before training; its blocks one by one if need be."""
    try:
        place_base(unet, device)
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    unet.to("cpu")
    free_cached(device)
    place_base(unet, device, "full", 1.0)


# --- the base --------------------------------------------------------------------------------------------------------


def _place(session: Session, rungs: list[str]) -> None:
    """Bring the base to its device, in fewer bits or partly away if it does not fit otherwise; adds to `rungs`."""
    while True:
        try:
            return put_base(session)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_cached(session.accelerator.device)
        rung = _down(session, Measured(None, None), only=BASE)
        _say_rung(session, rung, Measured(None, None), None)
        rungs.append(rung.name)


def put_base(session: Session) -> None:
    """The base as the plan says, on its device; what fewer bits cost is measured against the full one and said."""
    plan, device, model = session.plan, session.accelerator.device, session.model
    if session.config.memory.shard_base:
        if session.shared is None:
            session.shared = share_base(session)
        return
    lossy = plan.base_precision != "full"
    if lossy and session.base_reference is None:
        # The full base need not fit: with all of its blocks away it computes one batch.
        place_base(model.unet, device, "full", 1.0 if device.type == "cuda" else 0.0)
        with session.autocast():
            session.base_reference = base_prediction(model, session.family, _probe(session)).cpu()
    place_base(model.unet, device, plan.base_precision, plan.offload_share, lambda: _fresh(session))
    if session.asked.memory.channels_last:
        model.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if not lossy or session.base_reference is None:
        return
    with session.autocast():
        found = base_prediction(model, session.family, _probe(session)).cpu()
    session.base_error = relative_error(found, session.base_reference)
    taken = base_bytes(model.unet)
    session.emit(
        "phase",
        phase=f"base in {plan.base_precision}",
        base_precision=plan.base_precision,
        base_error=session.base_error,
        base_bytes=taken,
        message=f"The frozen model is kept in {plan.base_precision} ({taken / GIB:.2f} GiB); on one batch its "
        f"prediction is off by {session.base_error:.1%} of that of the full one.",
    )


def share_base(session: Session) -> SharedBase:
    """The base in shares, one in each process, every one on its device."""
    model, family, accelerator = session.model, session.family, session.accelerator
    require_plain(model.unet, session.plan)
    smallest = _probe(session, largest=False)

    def empty_pass() -> None:
        with session.autocast():
            base_prediction(model, family, smallest)

    shared = SharedBase(model.unet, accelerator.device, accelerator.is_main_process, empty_pass)
    held: Any = accelerator.gather(torch.tensor([shared.held_bytes], device=accelerator.device))
    session.emit(
        "phase",
        phase="base shared",
        base_bytes=shared.whole_bytes,
        held_bytes=held.tolist(),
        message=f"The frozen model ({shared.whole_bytes / GIB:.2f} GiB) is shared among {accelerator.num_processes} "
        f"processes; each keeps {max(held.tolist()) / GIB:.2f} GiB of it at most.",
    )
    return shared


def _probe(session: Session, *, largest: bool = True) -> Any:
    """The chosen image of the largest training pair, or of a small one, with its own noise."""
    buckets = [session.pairs.bucket(i) for i in session.train_indices]
    place = worst_pair(session, buckets) if largest else min(range(len(buckets)), key=lambda n: math.prod(buckets[n]))
    index = session.train_indices[place]
    steps = session.model.noise_scheduler.config.num_train_timesteps
    drawn = draw_randomness(session.config.seed, 0, index, session.pairs.latent_shape(index), num_train_timesteps=steps)
    return assemble(session.pairs, [index], [drawn], session.model, session.family, paired=False)


def _fresh(session: Session) -> Any:
    return fresh_unet(session.family, session.config.model, session.precision)


def fresh_unet(family: Family, config: Any, precision: str) -> Any:
    """The denoiser once more, on the CPU."""
    model: DiffusionModel = family.load(config, device="cpu", dtype=DTYPES[precision], encoders=False)
    return model.unet


# --- the ladder ------------------------------------------------------------------------------------------------------


def _down(session: Session, found: Measured, *, budget: int | None = None, only: tuple[str, ...] = ()) -> Rung:
    """One rung further before training; the base is not placed anew by it.

    Raises:
        MemoryShortError: there is none left.
    """
    plan = session.plan
    away = session.accelerator.device.type == "cuda"
    while following := next_rung(plan, session.asked, can_split=can_split(session), can_offload=away):
        rung, plan = following
        if not only or rung.needs in only:
            changed = rung.change(session.plan)  # without those that were only passed over
            assert changed is not None
            apply_plan(session, changed)
            return rung
    raise MemoryShortError(_does_not_fit(session, found, budget))


def apply_plan(session: Session, plan: Plan) -> None:
    """Let the session follow a plan; the base is placed by `put_base`, the optimizer made by `rebuild`."""
    session.plan = plan
    session.config = with_plan(session.asked, plan)
    session.split_pairs = plan.split_pairs
    set_checkpointing(session.model, plan.gradient_checkpointing)


def can_split(session: Session) -> bool:
    """Whether a pair is more than one image for this method."""
    return session.class_images is not None or any(name.startswith("rejected") for name in session.loss.needs)


def keep_decision(session: Session, decision: Decision) -> None:
    """Write down what was decided, for a resumed run."""
    if session.accelerator.is_main_process:
        write_decision(session.run, decision.model_copy(update={"base_error": session.base_error}))


def _say_plan(session: Session, found: Measured, budget: int, rungs: list[str], fits: bool) -> None:
    pace, peak = found.seconds_per_step or 0.0, found.peak_memory_bytes or 0
    left = pace * (session.config.training.steps - session.step)
    session.emit(
        "phase",
        phase="memory plan",
        plan=session.plan.model_dump(),
        rungs=rungs,
        budget_bytes=budget,
        seconds_left=left,
        **found.as_dict(),
        message=f"A step takes {peak / GIB:.2f} GiB of {budget / GIB:.2f} GiB and {pace:.2f} s"
        + (f"; savings added: {', '.join(rungs)}." if rungs else "."),
    )
    session.expected_pace = pace
    if not fits:
        session.emit(
            "warning",
            code="memory_budget",
            message=f"A step takes {peak / GIB:.2f} GiB and {budget / GIB:.2f} GiB are there; memory.plan is manual, "
            "so nothing is changed. It may run out of memory, or, on Windows, become several times slower.",
        )


def _say_rung(session: Session, rung: Rung, before: Measured, after: Measured | None) -> None:
    session.emit(
        "memory_step_down",
        rung=rung.name,
        cost=rung.cost,
        before=before.as_dict(),
        after=after.as_dict() if after else None,
        plan=session.plan.model_dump(),
        message=f"To save memory: {rung.name} ({rung.cost}).{_change(before, after)}",
    )


def _change(before: Measured, after: Measured | None) -> str:
    if after is None:
        return ""

    def words(m: Measured) -> str:
        if m.peak_memory_bytes is None or m.seconds_per_step is None:
            return "more than there is"
        return f"{m.peak_memory_bytes / GIB:.2f} GiB and {m.seconds_per_step:.2f} s per step"

    return f" Before: {words(before)}; after: {words(after)}."


def _does_not_fit(session: Session, found: Measured, budget: int | None) -> str:
    needs = "" if found.peak_memory_bytes is None else f" A step takes {found.peak_memory_bytes / GIB:.2f} GiB"
    have = "" if budget is None or not needs else f", {budget / GIB:.2f} GiB may be used."
    return (
        f"The training does not fit into the memory of {session.accelerator.device} with the savings that the settings "
        f"allow.{needs}{have} Close other programs that use it, lower data.resolution or adapter.rank, name fewer "
        "adapter.targets, or set memory.split_pairs, memory.base_precision and memory.offload to auto, and start "
        "again."
    )


# --- in the middle of a run ------------------------------------------------------------------------------------------


def with_less(session: Session, attempt: Callable[[], Result]) -> Result:
    """Call something that changes nothing but gradients, again with less memory each time that it runs out.

    Raises:
        MemoryShortError: nothing is left to save; everything but the gradients is as it was.
    """
    freed = False
    while True:
        session.optimizer.zero_grad(set_to_none=True)
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error) or session.shared is not None:
                raise  # with a shared base the others are in the middle of a pass, and nobody can say where
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside of `except`: the error's traceback holds the tensors that are to be freed.
        free_cached(session.accelerator.device)
        if freed:
            step_down(session, cause)
        freed = True


def step_down(session: Session, cause: str) -> None:
    """One rung further in the middle of a run.

    Raises:
        MemoryShortError: none is left, or several processes train, which would have to step down together.
    """
    following = next_rung(session.plan, session.asked, can_split=can_split(session), later=True)
    if following is None or session.accelerator.num_processes > 1:
        raise MemoryShortError(
            f"The memory of {session.accelerator.device} ran out at step {session.step}, and nothing is left to save "
            f"while training ({cause}). Close other programs that use it and resume; or start again with memory.plan "
            "set to the card's size, or a lower data.resolution or adapter.rank."
        )
    rung, plan = following
    apply_plan(session, plan)
    _say_rung(session, rung, Measured(None, None), None)
    before = read_decision(session.run)
    if before is None:
        before = Decision(plan=plan, machine=machine_name(session.accelerator.device))
    keep_decision(session, before.model_copy(update={"plan": plan, "rungs": (*before.rungs, rung.name)}))


def spared(
    session: Session, what: str, attempt: Callable[[], Result], smaller: Callable[[], Result] | None = None
) -> Result | None:
    """Do something that training does not depend on; where memory runs out twice, leave it out with a warning.

    Args:
        session: of the run.
        what: for the warning.
        attempt: the work.
        smaller: the same with less memory, for the second time; None: the same again.
    """
    for work in (attempt, smaller or attempt):
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error) or session.shared is not None:
                raise
        free_cached(session.accelerator.device)
    session.emit(
        "warning",
        code="out_of_memory",
        message=f"The memory of {session.accelerator.device} ran out while {what}; it is left out this time, and the "
        "training goes on.",
    )
    session.emit("phase", phase="training")


def step_or_back(session: Session) -> None:
    """The optimizer's step; where memory runs out in the middle of it, weights and state go back and it is tried again.

    The copy for that lies in the computer's memory. On a GPU every copied tensor waits for the device, so it is made
    only where the step can run out: the first time, when the optimizer makes its state, and while tensors nearly fill
    the device. Elsewhere a large adapter is not copied.

    Raises:
        MemoryShortError: it does not fit; weights and optimizer are as before the step, if they were copied.
    """
    device = session.accelerator.device
    if device.type == "cuda":
        copied = not session.optimizer.state or tensor_share(device) > NEARLY_FULL
    else:
        copied = 3 * sum(p.nbytes for p in session.parameters) <= _ALWAYS_COPIED_BYTES
    weights = [p.detach().to("cpu", copy=True) for p in session.parameters] if copied else []
    state = _copied(session.optimizer.state_dict()) if copied else None
    for last in (False, True):
        try:
            session.optimizer.step()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if state is None:
            break
        with torch.no_grad():
            for parameter, old in zip(session.parameters, weights, strict=True):
                parameter.copy_(old)
        session.optimizer.load_state_dict(_copied(state))
        if not last:
            free_cached(session.accelerator.device)
    raise MemoryShortError(
        f"The memory of {session.accelerator.device} ran out in the optimizer at step {session.step}. Close other "
        "programs that use it and resume; or start again with optimizer.type adamw8bit or a lower adapter.rank."
    )


def _copied(value: Any) -> Any:
    """Nested lists and dicts with copies of their tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(v) for v in value)
    return value
