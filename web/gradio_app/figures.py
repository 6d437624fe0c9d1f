"""Figures of a run as tables, and the small things that pages with tables and lists share."""

from __future__ import annotations

import html
from typing import Any

from mapo_core import ConfigError
from mapo_core.evaluate import read_evaluation
from mapo_core.runs import RunDir, list_runs, run_history

from .context import AppContext
from .work import note


def run_names(context: AppContext) -> list[str]:
    """The runs, newest first."""
    return [run.name for run in list_runs(context.home)]


def figures_html(run: RunDir, step: int) -> str:
    """What is measured of a checkpoint: by an evaluation if there is one, else by the run itself."""
    report = read_evaluation(run, step)
    if report is None:
        measured = [e for e in run_history(run).evaluated if e.get("step") == step]
        if not measured:
            return note(f"Step {step}: not measured. The Evaluate page measures it.")
        last, base = measured[-1], measured[-1].get("base") or {}
        rows = [
            (title, _number(base.get(name)), _number(last.get(name)), "")
            for name, title in (("accuracy", "held-out pair accuracy"), ("margin", "held-out margin"))
        ]
        hint = "Win rate and drift: measure them on the Evaluate page."
    else:
        rows = []
        if held := report["held_out"]:
            rows.append(("held-out pair accuracy", _of(held["accuracy_base"]), _of(held["accuracy"]), ""))
        rows += [(s["title"], _of(s["base"]), _of(s["lora"]), _of(s["win_rate"])) for s in report["scores"]]
        if drift := report["drift"]:
            rows.append(("drift on other prompts", "", f"{drift['relative']:.2f} of the base model's error", ""))
        hint = f"{len(report['prompts'])} prompts {report['prompts_from']}; [95 % intervals]"
    head = (f"step {step}", "base model", "LoRA", "win rate")
    return table_html(head, rows) + f"<div class='mapo-status'>{html.escape(hint)}</div>"


def table_html(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table that scrolls sideways on a small screen."""
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class='mapo-grid'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def without_head(card: str) -> str:
    """A model card without the lines that are for programs."""
    return card.partition("---\n")[2].partition("---\n")[2] if card.startswith("---\n") else card


def lines(text: str) -> list[str]:
    """The lines of a text that have something in them."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def numbers(text: str) -> list[float]:
    """The numbers of a text.

    Raises:
        ConfigError: it holds something else, or nothing.
    """
    try:
        found = [float(word) for word in (text or "").replace(",", " ").split()]
    except ValueError:
        found = []
    if not found:
        raise ConfigError(f"{text!r} is not a list of numbers such as 0.5, 1.0.")
    return found


def _of(interval: dict[str, Any]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-"
