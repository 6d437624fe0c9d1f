"""Everything that a run holds while it trains, and how it is made ready."""

from __future__ import annotations

import math
import os
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from . import checkpoints
from .adapter import add_lora, learning_rates
from .cache import EncodedPairs, PromptCache, encode_pairs
from .cache_files import note_use
from .class_images import class_pairs
from .config import TrainConfig, load_config
from .continuation import START, same_optimizer, start_of
from .data_order import divide_pairs
from .devices import DTYPES, choose_precision, preferred_device
from .errors import ConfigError, PairsError, RunError
from .evaluate.held_out import HeldOut
from .families import FAMILIES, detect
from .fused_lora import fully_fused, fuse_lora
from .guard import Guard
from .memory import room_to_draw, settle, with_smaller_vae
from .memory_plan import first_plan, read_decision, with_plan
from .methods import DreamBoothConfig
from .new_tokens import require_in_prompts
from .noising import seed_of
from .optimizers import build_optimizer, build_schedule, has_own_average, learning_rate_warning
from .pairs import open_pairs
from .pairs.scores import require_scores
from .parameters import ParameterGroup, flat
from .processes import WAIT, agree
from .runs import EventWriter, RequestWatcher, RunDir, mapo_home, write_atomic
from .sections import GuardConfig
from .sharding import SharedBase, take_from_accelerate, with_shared_base
from .speed import allow_tf32, compile_blocks, fuse, set_checkpointing
from .state import begin_from, build_average, put_back
from .tracking import Tracking, require_trackers, start_tracking

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from .families.base import DiffusionModel, Family
    from .memory_plan import Plan
    from .methods import Loss
    from .pairs import PreferencePair
    from .runs import EventType


@dataclass
class Session:
    """Everything that a run holds while it trains."""

    run: RunDir
    config: TrainConfig
    accelerator: Accelerator
    events: EventWriter | None  # only the main process writes
    watcher: RequestWatcher | None
    model: DiffusionModel
    family: Family
    loss: Loss
    source_pairs: Sequence[PreferencePair]
    pairs: EncodedPairs
    prompts: PromptCache
    class_images: EncodedPairs | None  # for methods that show some beside the pairs
    train_indices: Sequence[int]
    held_out_indices: Sequence[int]
    groups: list[ParameterGroup]
    parameters: list[nn.Parameter]  # of all groups, in their order
    optimizer: Any
    schedule: Any
    average: Any  # EMAModel of the parameters, or None
    precision: str
    asked: TrainConfig  # as the user gave it; `config` has the savings of `plan` in it
    plan: Plan
    split_pairs: bool  # one image of a pair after the other, with the same gradients in less memory
    step: int = 0
    nonfinite_in_a_row: int = 0
    nonfinite_total: int = 0
    held_out_base: HeldOut | None = None
    held_out: HeldOut | None = None
    guard: Guard = field(default_factory=lambda: Guard(GuardConfig(enabled=False)))
    starts_trained: bool = False  # at step 0 the LoRA is not the base model
    measured: dict[int, tuple[float, float]] = field(default_factory=dict)  # step -> held-out accuracy and margin
    base_reference: Tensor | None = None  # what the full base says of one batch, where the base has fewer bits
    base_error: float | None = None
    shared: SharedBase | None = None  # where each process keeps a part of the base
    tracking: Tracking | None = None  # in the main process, where the settings name a tracker
    spill_said: bool = False
    expected_pace: float = 0.0  # seconds per step as measured before training; 0: not measured
    started_at: float = field(default_factory=time.time)

    def emit(self, type_: EventType, **fields: Any) -> None:
        """Write an event, in the main process."""
        if self.events is None:
            return
        self.events.emit(type_, self.step, **fields)
        for problem in self.tracking.note(type_, self.step, fields) if self.tracking is not None else ():
            self.events.emit("warning", self.step, code="tracking", message=problem)

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of the arithmetic."""
        return self.accelerator.autocast() if self.precision != "fp32" else nullcontext()

    def step_autocast(self) -> AbstractContextManager[Any]:
        """The precision of the arithmetic in a training step: `autocast`, unless the weights' own is enough."""
        wanted = self.config.training.autocast
        if wanted is None:
            wanted = self.precision != "bf16" or not fully_fused(self.model.unet)
        return self.autocast() if wanted else nullcontext()

    def progress_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and optimizer, as JSON values."""
        return {
            "nonfinite_total": self.nonfinite_total,
            "held_out": self.held_out.as_dict() if self.held_out else None,
            "held_out_base": self.held_out_base.as_dict() if self.held_out_base else None,
            "measured": {str(step): list(values) for step, values in self.measured.items()},
            "guard": self.guard.state(),
            "started_at": self.started_at,
        }

    @property
    def wants_stop(self) -> bool:
        """Whether someone asked this process to stop."""
        return self.watcher is not None and self.watcher.stop_requested.is_set()


class StoppedEarlyError(Exception):
    """A stop was asked for before the first step; there is nothing to save."""


def prepare(run: RunDir, events: EventWriter | None, watcher: RequestWatcher | None) -> Session:
    """Load the model, encode the pairs, add the LoRA, and go back to the newest checkpoint if there is one."""

    def phase(name: str, done: int | None = None, total: int | None = None) -> None:
        # Of several processes only the main one knows of a stop; it tells the others in `main_first`, so that none
        # waits for it in vain.
        alone = accelerator.num_processes == 1 or total is not None
        if alone and watcher is not None and watcher.stop_requested.is_set():
            raise StoppedEarlyError
        if events is not None:
            events.emit("phase", None, phase=name, **({} if total is None else {"done": done, "total": total}))

    asked = load_config(run.config)
    if events is not None:
        require_trackers(asked)
    accelerator, fsdp = build_accelerator(asked, run)
    asked = with_shared_base(asked, accelerator, fsdp)
    decided = read_decision(run)
    plan = decided.plan if decided else first_plan(asked)
    config = with_plan(asked, plan)
    torch.manual_seed(seed_of(config.seed, "process"))
    allow_tf32(config.memory.tf32)
    precision = choose_precision(config.training.precision, accelerator.device)
    phase("reading the pairs")
    pairs = open_pairs(run.pairs)
    if not pairs:
        raise PairsError(f"{run.pairs} holds no pair. Build a pair set first: mapo pairs --help.")
    require_in_prompts(config.adapter, (p.prompt for p in pairs))
    found = detect(config.model.path, config.model.family)
    family = FAMILIES[found.family]
    loss = config.method.build("demo" if config.model.path == "demo" else family.name)
    if "chosen_score" in loss.needs:
        require_scores(pairs, config.method.type)
    tracking = start_tracking(accelerator, run, config) if events is not None else None
    phase("loading the model")
    cuda = accelerator.device.type == "cuda"
    # On a GPU the denoiser waits in the computer's memory until everything is encoded, so that it need not fit beside
    # VAE and text encoders.
    model = family.load(config.model, device="cpu" if cuda else accelerator.device, dtype=DTYPES[precision])
    model.encoders_to(accelerator.device)
    report = throttled(phase)
    split = divide_pairs(pairs, config.data.held_out, config.seed)
    wanted = validation_prompts(config, pairs, split[1])
    start = start_lora(run, config, accelerator)
    groups: list[ParameterGroup] = []
    if start is not None:  # it is part of the reference, whose prompts are encoded here
        groups = add_lora(model, family, config.adapter, config.seed, start)

    def encode() -> tuple[EncodedPairs, PromptCache, EncodedPairs | None]:
        extra = [*wanted, config.validation.negative_prompt]
        folder = mapo_home() / "cache"
        found, prompts = encode_pairs(model, family, pairs, config, folder, extra_prompts=extra, progress=report)
        require_transparency(config, found)
        return found, prompts, encode_class(model, family, config, precision, accelerator, report)

    def warn(message: str) -> None:
        if events is not None:
            events.emit("warning", None, code="out_of_memory", message=message)

    encoded, prompts, class_images = main_first(accelerator, lambda: with_smaller_vae(model, encode, warn))
    if accelerator.is_main_process:
        note_use(run, shards_used(encoded, class_images))
    if len(learning_rates(model, config.adapter)) == 1 and not config.adapter.new_tokens:
        model.text_encoders = []  # every prompt is encoded; the VAE waits on the CPU for the validation pictures
    assert model.vae is not None
    model.vae.to("cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    phase("adding the LoRA")
    groups = groups or add_lora(model, family, config.adapter, config.seed)
    parameters = flat(groups)
    for part in (model.unet, *model.text_encoders):
        fuse_lora(part)
    if plan.gradient_checkpointing:
        set_checkpointing(model, True)
    model.unet.train()
    optimizer, schedule = build_training(accelerator, groups, config)
    session = Session(
        run=run,
        config=config,
        accelerator=accelerator,
        events=events,
        watcher=watcher,
        model=model,
        family=family,
        loss=loss,
        source_pairs=pairs,
        pairs=encoded,
        prompts=prompts,
        class_images=class_images,
        train_indices=split[0],
        held_out_indices=split[1],
        groups=groups,
        parameters=parameters,
        optimizer=optimizer,
        schedule=schedule,
        guard=Guard(config.guard),
        average=None,
        precision=precision,
        asked=asked,
        plan=plan,
        split_pairs=plan.split_pairs,
        tracking=tracking,
    )
    settle(session, rebuild)
    if cuda:
        rebuild(session)  # the parameters have moved to the device meanwhile
    session.average = build_average(parameters, config.optimizer)
    if config.memory.compile:
        compile_blocks(session)
    config = session.config
    restore(session)
    session.emit(
        "phase",
        phase="ready",
        steps=config.training.steps,
        family=family.name,
        method=config.method.type,
        device=str(accelerator.device),
        precision=precision,
        pairs=len(session.train_indices),
        held_out_pairs=len(session.held_out_indices),
        pairs_per_step=config.training.train_batch_size
        * config.training.gradient_accumulation_steps
        * accelerator.num_processes,
        processes=accelerator.num_processes,
        trainable_parameters=sum(p.numel() for p in parameters),
        resolution=config.data.resolution or model.resolution,
        base_precision=session.plan.base_precision,
        base_error=session.base_error,
        base_shared=session.shared is not None,
    )
    if session.step == 0 and (odd := learning_rate_warning(config.optimizer)):
        session.emit("warning", code="learning_rate", message=odd)
    return session


def require_transparency(config: TrainConfig, pairs: EncodedPairs) -> None:
    """Refuse masks from transparency where there is none.

    Raises:
        PairsError: no image has a mask.
    """
    if config.loss.mask == "alpha" and not any(i.mask for e in pairs.entries for i in (e.chosen, e.rejected)):
        raise PairsError(
            "loss.mask is 'alpha', but no image has transparent parts and no pair names a mask. Save the images as PNG "
            "or WebP with transparency, or set loss.mask to 'file'."
        )


def start_lora(run: RunDir, config: TrainConfig, accelerator: Accelerator) -> Path | None:
    """The run's own copy of the LoRA that it continues from, made the first time; None where there is none.

    Raises:
        ConfigError: there is no such file.
    """
    if config.adapter.init_from is None:
        return None
    with accelerator.main_process_first():
        if not run.start_lora.exists():
            source = Path(config.adapter.init_from).expanduser()
            if not source.is_file():
                raise ConfigError(f"adapter.init_from: there is no file {source}. Correct the path.")
            write_atomic(run.start_lora, source.read_bytes())
    return run.start_lora


def build_training(accelerator: Accelerator, groups: list[ParameterGroup], config: TrainConfig) -> tuple[Any, Any]:
    """Optimizer and schedule, as at the start."""
    made = build_optimizer(groups, config.optimizer)
    if config.memory.fused_optimizer:
        fuse(made)
    optimizer = accelerator.prepare(made)
    if has_own_average(optimizer):
        optimizer.train()
    return optimizer, build_schedule(optimizer, config.optimizer, config.training.steps)


def rebuild(session: Session) -> None:
    """Optimizer and schedule anew, after steps that do not count."""
    session.accelerator.free_memory()  # forgets the old ones
    session.optimizer, session.schedule = build_training(session.accelerator, session.groups, session.config)


def encode_class(
    model: DiffusionModel,
    family: Family,
    config: TrainConfig,
    precision: str,
    accelerator: Accelerator,
    report: Callable[[str, int, int], None],
) -> EncodedPairs | None:
    """The class images of a method that shows some, drawn by the base model where they are not there yet."""
    if not isinstance(config.method, DreamBoothConfig):
        return None
    room_to_draw(model.unet, accelerator.device)
    pairs = class_pairs(
        model,
        family,
        config,
        config.method.class_prompt,
        config.method.class_images,
        autocast=lambda: accelerator.autocast() if precision != "fp32" else nullcontext(),
        progress=report,
    )
    encoded, _ = encode_pairs(model, family, pairs, config, mapo_home() / "cache", progress=report)
    return encoded


Encoded = tuple[EncodedPairs, PromptCache, EncodedPairs | None]


def main_first(accelerator: Accelerator, encode: Callable[[], Encoded]) -> Encoded:
    """Encode in the main process while the others wait; these then find everything in the cache.

    Raises:
        StoppedEarlyError: in every process, if the main one was asked to stop.
    """
    found, stopped = None, False
    if accelerator.is_main_process:
        try:
            found = encode()
        except StoppedEarlyError:
            stopped = True
    if agree(accelerator, stopped):
        raise StoppedEarlyError
    return encode() if found is None else found


def shards_used(*sets: EncodedPairs | None) -> dict[str, list[str]]:
    """Names of the cache's files that pair sets need, by kind."""
    used: dict[str, set[str]] = {}
    for one in sets:
        for kind, names in one.shards_used().items() if one is not None else ():
            used.setdefault(kind, set()).update(names)
    return {kind: sorted(names) for kind, names in used.items()}


def build_accelerator(config: TrainConfig, run: RunDir) -> tuple[Accelerator, bool]:
    """accelerate's view of the device and the processes, with the run's trackers, not yet started.

    Returns:
        It, and whether `accelerate launch` was told to share the model (FSDP).

    Raises:
        ConfigError: it was told something that there is not.
    """
    fsdp = take_from_accelerate()
    device = preferred_device(config.training.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[choose_precision(config.training.precision, device)]
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise ConfigError(
            "DeepSpeed is not supported. Launch with docs/accelerate/ddp.yaml: optimizer.type adamw8bit saves what "
            "ZeRO-2 would save on two GPUs. Or, for a model that does not fit on one GPU, with "
            "docs/accelerate/fsdp.yaml (docs/multi_gpu.md)."
        )
    patience = InitProcessGroupKwargs(timeout=WAIT)
    trackers: Any = list(config.tracking.trackers) or None
    made = Accelerator(
        mixed_precision=mixed,
        cpu=device.type == "cpu",
        log_with=trackers,
        project_dir=run.tracking if trackers else None,
        kwargs_handlers=[patience],
    )
    return made, fsdp


def restore(session: Session) -> None:
    """Go back to the newest checkpoint, or begin with the parent's state, if there is one.

    Raises:
        RunError: the parent's state is missing, or a checkpoint is damaged or another run's.
    """
    path, start = session.run.latest_checkpoint(), start_of(session.run)
    if session.config.parent and start is None:
        raise RunError(
            f"Run {session.run.name} goes on from {session.config.parent}, but its folder {START!r} with that state is "
            "missing: making it was interrupted. Delete the run and make it again."
        )
    session.starts_trained = start is not None
    if path is not None:
        put_back(session, checkpoints.load_checkpoint(path))
    elif start is not None:
        begin_from(session, checkpoints.load_checkpoint(start), same_optimizer(session.config, start))


def validation_prompts(
    config: TrainConfig, pairs: Sequence[PreferencePair], held: Sequence[int] | None = None
) -> list[str]:
    """The prompts of the validation pictures: those of the settings, or the first four of the held-out pairs.

    Args:
        config: of the run.
        pairs: its set.
        held: the held-out pairs, where they are known.
    """
    if config.validation.prompts:
        return list(config.validation.prompts)
    if held is None:
        held = divide_pairs(pairs, config.data.held_out, config.seed)[1]
    found: dict[str, None] = {}
    for index in held or range(len(pairs)):
        found[pairs[index].prompt] = None
        if len(found) == 4:
            break
    return list(found)


def throttled(report: Callable[..., None], interval_s: float = 0.5) -> Callable[[str, int, int], None]:
    """Pass on progress at most every `interval_s`, but always the end."""
    last = -math.inf

    def call(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last >= interval_s or done == total:
            last = now
            report(what, done, total)

    return call
