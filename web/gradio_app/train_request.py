"""What the Train page and the actions for programs ask the core for: pairs, models, settings, a run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mapo_core import ConfigError, build_config, find_models, merge_settings, pairs_from, plan_text, request_run
from mapo_core.pairs import list_sets
from mapo_core.runs import RunDir, add_to_queue, write_atomic

from .cards import pair_count
from .context import AppContext
from .forms import SettingsForm

DEMO = "demo"
DATA = {"data": {"pairs": "pairs.jsonl"}}  # what a run folder calls its pairs


def pair_choices(context: AppContext) -> list[tuple[str, str]]:
    """The kept sets, and the demo's pictures."""
    kept = [(f"{name} ({pair_count(count)})", name) for name, count in list_sets(context.home).items()]
    return [*kept, ("demo: cartoon pictures (built in)", DEMO)]


def model_choices(context: AppContext, *, again: bool = False) -> list[tuple[str, str]]:
    """The models in the folders that people keep them in; looked for once, unless they are to be looked for again."""
    if again or context.models is None:
        context.models = find_models(folder for folder in _model_folders(context) if folder.is_dir())
    return [
        ("demo: small built-in model", DEMO),
        *((f"{path.name}  ({path.parent})", str(path)) for path in context.models),
    ]


def _model_folders(context: AppContext) -> list[Path]:
    checkpoints = [folder / "models" / "checkpoints" for folder in _comfyui(context)]
    return [context.home / "models", *context.data_roots, *(folder for folder in checkpoints if folder.is_dir())]


def loras_folder(context: AppContext) -> str:
    """The loras folder of the ComfyUI that is known here; empty where none is."""
    folders = [folder / "models" / "loras" for folder in _comfyui(context)]
    return next((str(folder) for folder in folders if folder.is_dir()), "")


def _comfyui(context: AppContext) -> list[Path]:
    if context.listen:
        return []
    named = os.environ.get("COMFYUI_DIR")
    # Installed as a custom node, this pack lies in custom_nodes, beside models.
    return [*([Path(named)] if named else []), Path(__file__).resolve().parents[4]]


def settings_of(
    context: AppContext, form: SettingsForm, name: str, model: str, given: tuple[Any, ...]
) -> dict[str, Any]:
    """All settings that the page shows.

    Raises:
        ConfigError: one names a file that may not be read.
    """
    values = merge_settings(form.values(given), {"name": name.strip(), "model": {"path": model_path(context, model)}})
    context.check_settings(values)
    return values


def model_path(context: AppContext, text: str) -> str:
    """A model as the settings take it: paths checked and made absolute, `demo` and Hub ids as they are."""
    words = str(text or "").strip()
    if not words:
        raise ConfigError("Choose a base model: a file or folder, a Hub id, or demo.")
    is_path = words.endswith(".safetensors") or words.count("/") != 1 or Path(words).expanduser().exists()
    return str(context.safe_path(words)) if is_path and words != DEMO else words


def start(
    context: AppContext, values: dict[str, Any], pairs: str, progress: Callable[[int, int], None] | None = None
) -> tuple[RunDir, str]:
    """Make a run of what was asked for and queue it; the run, and what to say about it.

    Args:
        context: of the app.
        values: the settings.
        pairs: a kept set, "demo", or a path.
        progress: of looking at the pictures; what it raises ends the work, and no run is made.
    """
    source = str(pairs or "").strip()
    known = {value for _, value in pair_choices(context)}
    found = pairs_from(source if source in known else context.safe_path(source), context.home)
    if context.listen:
        context.check_readable(
            p for pair in found.pairs for p in (pair.chosen, pair.rejected, pair.chosen_mask, pair.rejected_mask)
        )
    run, report = request_run(values, found, context.home, progress)
    ahead = add_to_queue(run)
    words = f"{len(found.pairs)} pairs, {report.count('warning')} warnings."
    return run, f"{run.name} waits for {ahead} other run(s). {words}" if ahead else f"{run.name} starts. {words}"


# --- what a card needs -----------------------------------------------------------------------------------------------


def plan_note(context: AppContext, values: dict[str, Any]) -> str:
    """What the chosen memory plan begins with, and what was measured here with this model before, as Markdown."""
    words = plan_text(build_config(merge_settings(values, DATA)))
    seen = _measured(context).get(str(values["model"]["path"]), {})
    lines = [f"- **{plan}**: {one['words']} ({one['day']})" for plan, one in sorted(seen.items())]
    return "\n".join([words, *(["", "Measured on this machine with this model:", "", *lines] if lines else [])])


def remember_needs(context: AppContext, values: dict[str, Any], needs: dict[str, Any]) -> None:
    """Keep what the preflight measured, for `plan_note`; the newest for each model and plan."""
    plan = (values.get("memory") or {}).get("plan") or "auto"
    words = (
        f"{needs['family']} at {needs['resolution']} px, {needs['peak_memory_bytes'] / 2**30:.1f} GiB, "
        f"about {needs['seconds_per_step']:.2g} s per step on {needs['device']}"
    )
    known = _measured(context)
    known.setdefault(str(values["model"]["path"]), {})[plan] = {"words": words, "day": time.strftime("%Y-%m-%d")}
    write_atomic(_measured_file(context), json.dumps(known, indent=1))


def _measured_file(context: AppContext) -> Path:
    return context.home / "ui" / "measured.json"


def _measured(context: AppContext) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(_measured_file(context).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it only saves measuring again
        return {}
    return found if isinstance(found, dict) else {}
