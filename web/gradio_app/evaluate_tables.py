"""What the Evaluate page found, as tables."""

from __future__ import annotations

import html
from typing import Any

from .figures import table_html
from .work import note


def report_html(evaluation: dict[str, Any], text: str) -> str:
    """An evaluation as a table, with what was not measured and why."""
    rows = [tuple(cells) for cells in _columns(text.splitlines()[1:])]
    missing = "".join(
        f"<li>{html.escape(what)}: {html.escape(why)}</li>" for what, why in evaluation["not_measured"].items()
    )
    head = html.escape(text.splitlines()[0])
    return f"<div class='mapo-status'>{head}</div>{table_html(rows[0], rows[1:])}" + (
        f"<details><summary>Not measured</summary><ul>{missing}</ul></details>" if missing else ""
    )


def sweep_html(sweep: dict[str, Any], text: str) -> str:
    """The ranked trials."""
    names = list(dict.fromkeys(k for t in sweep["trials"] for k in t["measures"]))
    rows = []
    for place, t in enumerate(sweep["trials"], start=1):
        settings = " ".join(f"{k.rpartition('.')[2]}={v}" for k, v in t["values"].items())
        measures = [_interval(t["measures"].get(n)) for n in names]
        drift = "" if t["drift"] is None else f"{t['drift']:.2f}"
        rows.append((str(place), settings, *measures, drift, t["run"], t["message"]))
    notes = [line for line in text.splitlines() if line.startswith(("Not told apart", "One seed"))]
    table = table_html(("", "settings", *names, "drift", "run", ""), rows)
    return table + "".join(note(line) for line in notes)


def scorers_html(rows: list[dict[str, Any]]) -> str:
    """Which scorers can be used."""
    lines_ = []
    for row in rows:
        state = "<span class='mapo-badge finished'>ready</span>" if row["missing"] is None else (
            "<span class='mapo-badge'>weights missing</span>"
        )  # fmt: skip
        lacks = "" if row["missing"] is None else f"<br><code>{html.escape(row['missing'])}</code>"
        about = html.escape(row["about"])
        lines_.append(f"<tr><td><b>{html.escape(row['name'])}</b><br>{state}</td><td>{about}{lacks}</td></tr>")
    return f"<div class='mapo-grid'><table><tbody>{''.join(lines_)}</tbody></table></div>"


def _columns(rows: list[str]) -> list[list[str]]:
    """The cells of a table in text, whose columns are two spaces apart."""
    head = rows[0]
    starts = [head.index(name) for name in ("measure", "base", "LoRA", "difference", "win rate")]
    ends = [*starts[1:], None]
    cells = []
    for row in rows:
        if row.startswith("not measured:"):
            break
        cells.append([row[a:b].strip() for a, b in zip(starts, ends, strict=True)])
    return cells


def _interval(value: dict[str, Any] | None) -> str:
    return "" if value is None else f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
