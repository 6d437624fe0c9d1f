"""The model card of a LoRA: what it was trained on, with which settings, what came of it, as Markdown."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from .config import load_config
from .errors import RunError
from .evaluate import read_evaluation
from .report import changed_settings
from .runs import checkpoint_step, read_events, write_atomic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from .pairs import PreferencePair
    from .runs import RunDir

LICENCE_NOTICE = (
    "A LoRA is made from its base model and from the pictures it was trained on. Read the licence of the base model "
    "and the rights of the pictures, and write here what others may do with this file. Nothing is granted until you do."
)
_KEPT_HEAD = "README"
_ORIGINS = 1000  # different origins of prompts that are counted


def model_card(run: RunDir, step: int | None = None, licence: str = "") -> str:
    """The card of a run's LoRA.

    Args:
        run: the run.
        step: of the checkpoint that the LoRA was made from; None for the newest.
        licence: what the user says about it; empty: a notice that this has to be filled in.

    Raises:
        ConfigError: the run's config cannot be read.
        RunError: the run has no checkpoint.
    """
    from .pairs import open_pairs

    steps = [checkpoint_step(path) for path in run.list_checkpoints()]
    if step is None and not steps:
        raise RunError(f"Run {run.name} has no checkpoint, so there is no LoRA to describe. Train it first.")
    step = steps[-1] if step is None else step
    config = load_config(run.config)
    pairs = open_pairs(run.pairs)
    base = config.model.path
    head = [
        "---",
        *([f"base_model: {base}"] if base.count("/") == 1 and not base.startswith((".", "/", "~")) else []),
        "tags:",
        "- lora",
        "- text-to-image",
        "- preference-optimization",
        f"- {config.method.type}",
        "---",
    ]
    trigger = f"Put `{config.export.trigger}` into the prompt." if config.export.trigger else "No trigger word is set."
    lines = [
        *head,
        f"# {run.name}",
        "",
        f"A LoRA of rank {config.adapter.rank} for `{base}`, trained with `{config.method.type}` on "
        f"{len(pairs)} pairs of a preferred and another picture, {step} steps.",
        "",
        "## Use",
        "",
        "Load it with ComfyUI's *Load LoRA* or with diffusers' `load_lora_weights`, strength 1 to begin with. "
        + trigger,
        "",
        "## Training data",
        "",
        *_data(pairs, _held_out_count(run)),
        "",
        "## Figures",
        "",
        *_figures(run, step),
        "",
        "## Settings that are not the default",
        "",
        *(f"- `{line}`" for line in changed_settings(config)),
        "",
        "## Licence",
        "",
        licence.strip() or LICENCE_NOTICE,
    ]
    return "\n".join(lines) + "\n"


def save_model_card(folder: Path, text: str) -> Path:
    """Write a card into a folder as README.md; another one that is there is kept, and the new one gets a number."""
    number, path = 1, folder / f"{_KEPT_HEAD}.md"
    while path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        number += 1
        path = folder / f"{_KEPT_HEAD}-{number}.md"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    return path


def _data(pairs: Sequence[PreferencePair], held_out: int) -> list[str]:
    from .pairs.views import count_different

    kinds: Counter[str] = Counter()
    for pair in pairs:
        origin = pair.source.partition(";")[2].strip() or pair.source or "not said"
        kinds["a caption file" if origin.endswith(".txt") else origin] += 1
        if len(kinds) > _ORIGINS:
            kinds = Counter(dict(kinds.most_common(_ORIGINS // 2)))
    prompts = count_different(p.prompt for p in pairs)
    said = ", ".join(f"{name} ({n})" for name, n in kinds.most_common(4))
    lines = [
        f"- {len(pairs)} pairs, {held_out} of them held out from training to measure with",
        f"- {prompts} different prompts; they come from: {said}",
    ]
    examples: dict[str, None] = {}
    for pair in pairs:
        if pair.prompt:
            examples[pair.prompt] = None
        if len(examples) == 3:
            break
    return lines + [f"- for example: {' '.join(text.split())[:120]}" for text in examples]


def _held_out_count(run: RunDir) -> int:
    known = [e["held_out_pairs"] for e in read_events(run.events) if e.get("held_out_pairs") is not None]
    return int(known[-1]) if known else 0


def _figures(run: RunDir, step: int) -> list[str]:
    """From the evaluation of this very step, else from what the run measured itself."""
    report = read_evaluation(run, step)
    if report is not None:
        rows = [("measure", "base model", "with the LoRA", "win rate"), ("---", "---", "---", "---")]
        if held := report["held_out"]:
            rows.append(("held-out pair accuracy", _of(held["accuracy_base"]), _of(held["accuracy"]), ""))
        rows += [(s["title"], _of(s["base"]), _of(s["lora"]), _of(s["win_rate"])) for s in report["scores"]]
        if drift := report["drift"]:
            rows.append(("drift on other prompts", "", f"{drift['relative']:.2f} of the base model's error", ""))
        note = f"{len(report['prompts'])} prompts {report['prompts_from']}, {report['seeds']} seeds; 95 % intervals."
        return [*("| " + " | ".join(row) + " |" for row in rows), "", note]
    measured = [e for e in read_events(run.events) if e["type"] == "evaluated" and e.get("step") == step]
    if not measured:
        return ["Not measured."]
    last, base = measured[-1], measured[-1].get("base") or {}
    rows = [("held-out pairs", "base model", "with the LoRA"), ("---", "---", "---")]
    rows += [(name, _number(base.get(name)), _number(last.get(name))) for name in ("accuracy", "margin")]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _of(interval: dict[str, Any]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
