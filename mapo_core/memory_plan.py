"""Which savings of memory a run uses, in which order they are added, and what each costs. Pure Python, no model."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import ValidationError

from ._settings import Settings
from .errors import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .config import TrainConfig
    from .runs import RunDir

BasePrecision = Literal["full", "int8", "nf4", "fp8"]
GIB = 2**30
ROOM = 0.95  # of the budget a measured peak may take; pictures and measures come on top now and then
PLAIN_ROOM = 0.85  # the same where gradient checkpointing could still be switched on: it costs little to be sure
CONTEXT_BYTES = 600 * 2**20  # what a CUDA process takes of a card before the first tensor


class Plan(Settings):
    """The savings of a run.

    Attributes:
        gradient_checkpointing: on or off, also where the settings leave it to the plan.
        optimizer, train_batch_size, gradient_accumulation_steps: as in the settings.
        split_pairs: the images of a pair one after the other.
        base_precision: how the frozen weights are kept.
        offload_share: of the denoiser's blocks that wait in the computer's memory.
    """

    gradient_checkpointing: bool
    optimizer: str
    split_pairs: bool
    base_precision: BasePrecision
    offload_share: float
    train_batch_size: int
    gradient_accumulation_steps: int


class Decision(Settings):
    """A plan and what it rests on, as a run folder keeps it.

    Attributes:
        plan: the savings.
        machine: where it was measured.
        rungs: names of the savings added to what was asked for, in order.
        peak_memory_bytes, seconds_per_step, budget_bytes: measured with this plan; None where nothing was measured.
        base_error: |prediction - that of the full base| / |that|, on one batch; None with a full base.
    """

    plan: Plan
    machine: str
    rungs: tuple[str, ...] = ()
    peak_memory_bytes: int | None = None
    seconds_per_step: float | None = None
    budget_bytes: int | None = None
    base_error: float | None = None


class Rung(NamedTuple):
    """One saving: its name, what it costs, and the plan with it (None if there is nothing to gain)."""

    name: str
    cost: str
    change: Callable[[Plan], Plan | None]
    needs: str  # memory.<field> that must be "auto"; empty if the plan alone decides
    later: bool  # can be added in the middle of a run


def _set(**fields: Any) -> Callable[[Plan], Plan | None]:
    def change(plan: Plan) -> Plan | None:
        changed = plan.model_copy(update=fields)
        return None if changed == plan else changed

    return change


def _smaller_batch(plan: Plan) -> Plan | None:
    batch = plan.train_batch_size
    if batch == 1:
        return None
    factor = next(n for n in range(2, batch + 1) if batch % n == 0)
    return plan.model_copy(
        update={
            "train_batch_size": batch // factor,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps * factor,
        }
    )


def _eight_bit(plan: Plan) -> Plan | None:
    return plan.model_copy(update={"optimizer": "adamw8bit"}) if plan.optimizer == "adamw" else None


def _fewer_bits(to: BasePrecision) -> Callable[[Plan], Plan | None]:
    bits = {"full": 16, "fp8": 8, "int8": 8, "nf4": 4}

    def change(plan: Plan) -> Plan | None:
        return plan.model_copy(update={"base_precision": to}) if bits[to] < bits[plan.base_precision] else None

    return change


def _more_offload(share: float) -> Callable[[Plan], Plan | None]:
    return lambda plan: plan.model_copy(update={"offload_share": share}) if plan.offload_share < share else None


# First what changes speed alone, then what changes the arithmetic a little, last what is slow.
RUNGS = (
    Rung(
        "gradient checkpointing",
        "activations are computed twice: about a third slower",
        _set(gradient_checkpointing=True),
        "",
        True,
    ),
    Rung(
        "8-bit Adam",
        "the optimizer's averages are kept in 8 bits: no slower, steps are rounded",
        _eight_bit,
        "",
        False,
    ),
    Rung(
        "split pairs",
        "the two images of a pair one after the other, the chosen one twice: exact, up to half as slow again",
        _set(split_pairs=True),
        "split_pairs",
        True,
    ),
    Rung(
        "smaller batch",
        "fewer pairs at once and more passes per step, the same pairs in each step: exact, slower per pair",
        _smaller_batch,
        "",
        True,
    ),
    Rung(
        "base in int8",
        "linear layers of the frozen model in 8 bits: slower, and the model is a little off",
        _fewer_bits("int8"),
        "base_precision",
        False,
    ),
    Rung(
        "base in nf4",
        "linear layers of the frozen model in 4 bits: slower, and the model is off by more",
        _fewer_bits("nf4"),
        "base_precision",
        False,
    ),
    Rung(
        "half of the base offloaded",
        "every second block waits in the computer's memory: exact, slower",
        _more_offload(0.5),
        "offload",
        False,
    ),
    Rung(
        "all of the base offloaded",
        "all blocks wait in the computer's memory: exact, much slower",
        _more_offload(1.0),
        "offload",
        False,
    ),
)

# What a card of a size starts with. Gradient checkpointing that is left to the plan is on at first; `memory.settle`
# then switches it off where a step fits without.
PRESETS: dict[str, dict[str, Any]] = {
    "6GB": {"gradient_checkpointing": True, "split_pairs": True, "base_precision": "nf4", "one": True, "small": True},
    "8GB": {"gradient_checkpointing": True, "split_pairs": True, "base_precision": "int8", "one": True, "small": True},
    "10GB": {"gradient_checkpointing": True, "split_pairs": True, "one": True, "small": True},
    "12GB": {"gradient_checkpointing": True, "split_pairs": True, "small": True},
    "16GB": {"gradient_checkpointing": True, "small": True},
    "24GB": {"gradient_checkpointing": True},
    "48GB": {"gradient_checkpointing": False},
}


def first_plan(config: TrainConfig) -> Plan:
    """What the settings ask for, and for a card size what such a card needs.

    Settings of the section `memory` that are not "auto" stand in every plan. Gradient checkpointing that is not set is
    on, the safe way, until it is known whether a step fits without.
    """
    memory, training = config.memory, config.training
    plan = Plan(
        gradient_checkpointing=training.gradient_checkpointing is not False,
        optimizer=config.optimizer.type,
        split_pairs=memory.split_pairs == "on",
        base_precision="full" if memory.base_precision == "auto" else memory.base_precision,
        offload_share=memory.offload_share if memory.offload == "on" else 0.0,
        train_batch_size=training.train_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
    )
    preset = PRESETS.get(memory.plan, {})
    fixed = {k: v for k, v in preset.items() if k in Plan.model_fields and getattr(memory, k, "auto") == "auto"}
    plan = plan.model_copy(update=fixed)
    if preset.get("small"):
        plan = _eight_bit(plan) or plan
    while preset.get("one") and (smaller := _smaller_batch(plan)):
        plan = smaller
    return plan


def savings_words(plan: Plan, base_error: float | None = None) -> str:
    """A plan in words, the frozen base first.

    Args:
        plan: the savings.
        base_error: how far the base in fewer bits is off, if that was measured.
    """
    base = f"base in {plan.base_precision}" if plan.base_precision != "full" else "full base"
    ways = [
        base + ("" if base_error is None else f" (off by {base_error:.1%})"),
        *(["gradient checkpointing"] if plan.gradient_checkpointing else []),
        *(["split pairs"] if plan.split_pairs else []),
        *([f"{plan.offload_share:.0%} of the base offloaded"] if plan.offload_share else []),
        f"batch {plan.train_batch_size} x {plan.gradient_accumulation_steps}",
        plan.optimizer,
    ]
    return ", ".join(ways)


def plan_text(config: TrainConfig) -> str:
    """What a run begins with to save memory, and whether more is added where it does not fit, in a sentence or two."""
    begins = f"Begins with {savings_words(first_plan(config))}."
    if config.memory.plan == "manual":
        return f"{begins} Nothing is added: a run that does not fit ends with an error."
    if open_checkpointing(config):
        begins += " Gradient checkpointing is on only where a step would not fit without it."
    return f"{begins} More savings are added while a measured step does not fit."


def open_checkpointing(config: TrainConfig) -> bool:
    """Whether the plan is to find out if gradient checkpointing is needed."""
    memory = config.memory
    return config.training.gradient_checkpointing is None and memory.plan != "manual" and memory.preflight != "off"


def room_for(plan: Plan, config: TrainConfig) -> float:
    """The share of the budget that a step with this plan may take."""
    return PLAIN_ROOM if open_checkpointing(config) and not plan.gradient_checkpointing else ROOM


def next_rung(
    plan: Plan, config: TrainConfig, *, can_split: bool = True, can_offload: bool = True, later: bool = False
) -> tuple[Rung, Plan] | None:
    """The next saving and the plan with it; None at the end of the ladder, or where nothing may be changed.

    Args:
        plan: the present one.
        config: as the user gave it; what it sets in `memory` is not touched.
        can_split: the method has two images to split.
        can_offload: the device has a memory of its own.
        later: only what can be added in the middle of a run, whatever `memory.plan` says: the alternative is its end.
    """
    if config.memory.plan == "manual" and not later:
        return None
    for rung in RUNGS:
        if later and not rung.later:
            continue
        if rung.needs and getattr(config.memory, rung.needs) != "auto":
            continue
        if (rung.needs == "split_pairs" and not can_split) or (rung.needs == "offload" and not can_offload):
            continue
        changed = rung.change(plan)
        if changed is not None:
            return rung, changed
    return None


def with_plan(config: TrainConfig, plan: Plan) -> TrainConfig:
    """The settings with a plan's in their place; pairs per step stay the same."""
    training = config.training.model_copy(
        update={
            "gradient_checkpointing": plan.gradient_checkpointing,
            "train_batch_size": plan.train_batch_size,
            "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        }
    )
    optimizer = config.optimizer.model_copy(update={"type": plan.optimizer})
    memory = config.memory.model_copy(
        update={
            "split_pairs": "on" if plan.split_pairs else "off",
            "base_precision": plan.base_precision,
            "offload": "on" if plan.offload_share else "off",
            "offload_share": plan.offload_share or config.memory.offload_share,
            # Only AdamW can; where the ladder has put 8-bit Adam in its place, that is what counts.
            "fused_optimizer": config.memory.fused_optimizer and plan.optimizer == config.optimizer.type,
        }
    )
    return config.model_copy(update={"training": training, "optimizer": optimizer, "memory": memory})


def budget_of(setting: str, available_bytes: int, own_bytes: int = CONTEXT_BYTES) -> int:
    """Bytes that a run may take: those available, or of the named card size what its own context leaves, if less."""
    if setting in PRESETS:
        return min(available_bytes, int(setting.removesuffix("GB")) * GIB - own_bytes)
    return available_bytes


def spilled(step_seconds: Sequence[float], expected_s: float, used_share: float) -> bool:
    """Whether the driver seems to have moved memory of the device into the computer's, as Windows drivers do.

    Nothing fails then, but every step is several times slower. The sign: the last five steps take, in the middle, more
    than three times what was measured beforehand, while the device's memory is nearly full.

    Args:
        step_seconds: of the latest steps.
        expected_s: measured before training; 0 where nothing was measured.
        used_share: of the device's memory that is taken, 0-1.
    """
    if len(step_seconds) < 5 or expected_s <= 0:
        return False
    return used_share > 0.9 and statistics.median(step_seconds[-5:]) > 3 * expected_s


def read_decision(run: RunDir) -> Decision | None:
    """What was decided for a run, if anything was.

    Raises:
        RunError: the file is damaged.
    """
    try:
        return Decision.model_validate_json(run.memory.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise RunError(
            f"{run.memory} cannot be read ({error}). Delete it; the run then decides again how to save memory."
        ) from error


def write_decision(run: RunDir, decision: Decision) -> None:
    """Keep a decision, so that a resumed run does the same."""
    from .runs import write_atomic

    write_atomic(run.memory, decision.model_dump_json(indent=2) + "\n")
