"""A run that goes on from another one's checkpoint with changed pairs or settings; nothing is encoded again.

The new run has a copy of the checkpoint in its folder `start`, so it needs its parent no longer. It begins at step 0
with the parent's weights; the optimizer's state is kept where the optimizer is the same. Every pair carries whether it
was held out, so that the two runs hold out the same pairs. The images are known to the cache by their content.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from .config import build_config, load_settings, merge_settings
from .errors import PairsError, RunError
from .runs import RunDir, checkpoint_step, create_run, folder_atomic

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from .config import TrainConfig
    from .pairs import PreferencePair

START = "start"


def continue_run(
    run: RunDir,
    *,
    exclude: Iterable[int] = (),
    flip: Iterable[int] = (),
    step: int | None = None,
    name: str | None = None,
    settings: dict[str, Any] | None = None,
    home: Path | None = None,
) -> RunDir:
    """Make a run that goes on from a checkpoint of another; start it with `runs.start_run`.

    Args:
        run: the parent.
        exclude: lines of its pairs.jsonl, from 0, that are left out.
        flip: lines whose chosen and rejected image change places.
        step: its checkpoint; None for the newest.
        name: of the new run; None for the parent's with "-next".
        settings: nested settings that differ from the parent's. Without training.steps, the new run has the steps
            that the parent had left, or as many as the parent where it had none left.
        home: where the runs are; None for the usual place.

    Raises:
        PairsError: there is no such pair, or one is in both lists, or no pair is left.
        RunError: there is no such checkpoint.
        ConfigError: the settings are wrong.
    """
    from .pairs import pair_lines

    path = run.latest_checkpoint() if step is None else run.checkpoint_path(step)
    if path is None or not path.exists():
        steps = ", ".join(str(checkpoint_step(p)) for p in run.list_checkpoints()) or "none"
        raise RunError(f"Run {run.name} has no checkpoint{'' if step is None else f' of step {step}'}; it has {steps}.")
    values = load_settings(run.config)
    pairs = changed_pairs(run, values, set(exclude), set(flip))
    done, planned = checkpoint_step(path), values["training"]["steps"]
    base = merge_settings(values, {"name": name or f"{run.name}-next", "parent": f"{run.name}@{done}"})
    base["training"] = {**base["training"], "steps": planned - done if planned > done else planned}
    merged = merge_settings(base, settings or {})
    merged["optimizer"] = {**merged["optimizer"]}
    if "warmup_steps" not in (settings or {}).get("optimizer", {}):
        merged["optimizer"]["warmup_steps"] = 0  # the weights are warm
    config = build_config(merged)
    new = create_run(config.name, config.to_json(), pair_lines(pairs), home)
    with folder_atomic(new.path / START) as folder:
        for part in ("lora.safetensors", "training.safetensors", "optimizer.safetensors", "state.json"):
            if (path / part).exists():
                shutil.copyfile(path / part, folder / part)
        (folder / "optimizer.json").write_text(json.dumps(values["optimizer"]), encoding="utf-8")
    return new


def changed_pairs(run: RunDir, values: dict[str, Any], exclude: set[int], flip: set[int]) -> Iterator[PreferencePair]:
    """The parent's pairs with the changes made, each marked with whether the parent held it out, one after the other.

    Raises:
        PairsError: there is no such pair, or one is in both lists, or none is left.
    """
    from .data_order import divide_pairs
    from .pairs import load_pairs

    pairs = load_pairs(run.pairs)
    if odd := sorted(i for i in exclude | flip if not 0 <= i < len(pairs)):
        raise PairsError(
            f"Run {run.name} has no pair {', '.join(map(str, odd))}: they are numbered from 0 to {len(pairs) - 1}, as "
            "the lines of its pairs.jsonl; see: mapo inspect."
        )
    if both := sorted(exclude & flip):
        raise PairsError(f"Pair {', '.join(map(str, both))} is to be left out and turned round; choose one of the two.")
    trained, held = divide_pairs(pairs, values.get("data", {}).get("held_out", 0.1), values.get("seed", 0))
    if all(place in exclude for place in trained):
        raise PairsError("No pair to train on is left. Exclude fewer.")
    marks = bytearray(len(pairs))
    for place in held:
        marks[place] = 1
    marked = (
        (place, pair.model_copy(update={"held_out": bool(marks[place])}))
        for place, pair in enumerate(pairs)
        if place not in exclude
    )
    return (flipped(pair) if place in flip else pair for place, pair in marked)


def flipped(pair: PreferencePair) -> PreferencePair:
    """The pair with its images' places changed, and all that belongs to them."""
    return pair.model_copy(
        update={
            "chosen": pair.rejected,
            "rejected": pair.chosen,
            "chosen_mask": pair.rejected_mask,
            "rejected_mask": pair.chosen_mask,
            "chosen_score": pair.rejected_score,
            "rejected_score": pair.chosen_score,
            "prompt": pair.rejected_prompt or pair.prompt,
            "rejected_prompt": pair.prompt if pair.rejected_prompt is not None else None,
            "source": f"{pair.source}, turned round".removeprefix(", "),
        }
    )


def start_of(run: RunDir) -> Path | None:
    """The folder of the state that a run begins with; None where it begins at the base model."""
    path = run.path / START
    return path if path.exists() else None


def same_optimizer(config: TrainConfig, start: Path) -> bool:
    """Whether the optimizer's state of the parent suits the new run: the same kind over the same groups of weights."""
    before = json.loads((start / "optimizer.json").read_text(encoding="utf-8"))
    now = config.optimizer
    return (before["type"], before.get("lora_plus_ratio", 1.0)) == (now.type, now.lora_plus_ratio)


def read_inspection(run: RunDir, step: int | None = None) -> dict[str, Any] | None:
    """The newest stored per-pair view of a run, or that of a step, as plain data; None where there is none.

    Its fields are those of `inspect_pairs.Inspection`; `sheet` is the path of its pictures.
    """
    folder = run.path / "inspection"
    files = sorted(folder.glob("step_*.json")) if step is None else [folder / f"step_{step:08d}.json"]
    if not files or not files[-1].exists():
        return None
    found = json.loads(files[-1].read_text(encoding="utf-8"))
    return {**found, "sheet": str(files[-1].with_suffix(".png"))}
