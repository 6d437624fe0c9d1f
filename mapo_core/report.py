"""A run in words: what it was made of and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import load_config
from .console import duration
from .memory_plan import read_decision
from .runs import best_step, checkpoint_step, reader_of, run_history, run_status

if TYPE_CHECKING:
    from .runs import RunDir


def run_report(run: RunDir) -> str:
    """State, measures before and after, warnings, settings that are not the default, and files, as text.

    Raises:
        ConfigError: the run's config cannot be read.
    """
    config, status, history = load_config(run.config), run_status(run), run_history(run)
    of = f" of {status.steps}" if status.steps else ""
    lines = [f"{run.name}: {status.state}, step {status.step}{of}"]
    if status.message:
        lines.append(status.message)
    lines += ["", *_measures(history.evaluated), "", *_course(run, status.metrics)]
    if history.warnings:
        lines += ["", f"Warnings ({len(history.warnings)}):", *(f"  {w}" for w in dict.fromkeys(history.warnings[-5:]))]
    lines += ["", "Settings that are not the default:", *(f"  {line}" for line in changed_settings(config)), ""]
    lines += [f"LoRA: {path}" for path in sorted(run.export.glob("*.safetensors"))] or ["LoRA: none yet"]
    lines.append(f"Run folder: {run.path}")
    return "\n".join(lines) + "\n"


def _measures(evaluated: list[dict[str, Any]]) -> list[str]:
    if not evaluated:
        return ["Held-out pairs: not measured."]
    last, base = evaluated[-1], evaluated[-1].get("base") or evaluated[0]
    if not last.get("step"):
        return [f"Held-out pairs: measured with the base model alone (accuracy {_number(base.get('accuracy'))})."]
    rows = (
        ("accuracy", "accuracy"),
        ("margin", "margin"),
        ("error on chosen", "chosen_mse"),
        ("error on rejected", "rejected_mse"),
    )
    lines = [f"{'held-out pairs':<20} {'base':>10} {'LoRA':>10}   (LoRA of step {last['step']})"]
    return lines + [f"{title:<20} {_number(base.get(k)):>10} {_number(last.get(k)):>10}" for title, k in rows]


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _course(run: RunDir, metrics: dict[str, Any]) -> list[str]:
    reader = reader_of(run)
    events, last = reader.events(), reader.status().last_event_time
    lines = []
    if pace := metrics.get("seconds_per_step"):
        lines.append(f"{pace:.2f} s per step")
    if memory := metrics.get("peak_memory_bytes"):
        lines.append(f"largest memory use {memory / 2**30:.1f} GiB")
    lines += _memory(run)
    if events and last is not None:
        lines.append(f"first to last event {duration(last - events[0]['time'])}")
    steps = [checkpoint_step(path) for path in run.list_checkpoints()]
    if steps:
        lines.append(f"checkpoints {', '.join(map(str, steps))}; best on held-out pairs: {best_step(run)}")
    return lines


def changed_settings(config: Any) -> list[str]:
    """`section.field = value` of everything that differs from the default."""
    lines = []
    for name, value in config:
        if name in ("name", "schema_version") or value is None:
            continue
        if not hasattr(type(value), "model_fields"):
            if value != type(config).model_fields[name].default:
                lines.append(f"{name} = {value}")
            continue
        for inner, info in type(value).model_fields.items():
            given = getattr(value, inner)
            if given != info.default and (name, inner) != ("data", "pairs"):
                lines.append(f"{name}.{inner} = {given}")
    return lines or ["none"]


def _memory(run: RunDir) -> list[str]:
    """What was decided about memory, and what it cost."""
    decision = read_decision(run)
    if decision is None:
        return []
    lines = [f"savings added to fit: {', '.join(decision.rungs)}"] if decision.rungs else []
    if decision.base_error is not None:
        lines.append(
            f"trained on the base in {decision.plan.base_precision}, whose prediction is off by "
            f"{decision.base_error:.1%}; pictures drawn afterwards use the full one where it fits"
        )
    return lines
