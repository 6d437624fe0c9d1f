"""Settings as widgets: input, default, range and text all come from the config's own schema."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from comfy_api.latest import io

from ..mapo_core import FormField, MapoError, build_config, form_field, form_groups, merge_settings

ALONE = {
    "name": "settings",
    "model": {"path": "demo"},
    "data": {"pairs": "pairs.jsonl"},
    "training": {"steps": 10_000_000},  # the most, because another node may give steps for a long warm-up
}
"""What a complete config needs beside the settings that a node is checked with."""


@dataclass(frozen=True)
class Widget:
    """A widget's id, and the setting that it sets."""

    id: str
    field: FormField


def widgets_of(*paths: str) -> list[Widget]:
    """Widgets for settings such as "optimizer.learning_rate"; "cache_precision=cache.precision" gives another id."""
    found = []
    for text in paths:
        name, _, path = text.rpartition("=")
        field = form_field(*path.split("."))
        found.append(Widget(name or field.name, field))
    return found


def inputs_of(widgets: list[Widget]) -> list[io.Input]:
    """The node inputs; a set of choices becomes one switch for each of them."""
    return [one for widget in widgets for one in _inputs(widget)]


def values_of(widgets: list[Widget], given: dict[str, Any]) -> dict[str, Any]:
    """What the widgets say, as nested settings; automatic ones are left out."""
    values: dict[str, Any] = {}
    for widget in widgets:
        field = widget.field
        if field.kind == "toggles":
            value: Any = [c for c in field.choices if given[f"{widget.id}_{c}"]]
        else:
            value = field.to_setting(given[widget.id])
        if value is None:
            continue
        group = values
        for part in field.path[:-1]:
            group = group.setdefault(part, {})
        group[field.name] = value
    return values


def problem(values: dict[str, Any]) -> str | None:
    """What is wrong with settings by themselves, or None; what another settings node may still give is not missed."""
    method = values.get("method", {}).get("type")
    elsewhere = {
        f.name: "given elsewhere" for g in form_groups() if g.path == ("method", method) for f in g.fields if f.required
    }
    try:
        build_config(merge_settings(ALONE, {"method": {"type": method, **elsewhere}} if method else {}, values))
    except MapoError as error:
        return str(error)
    return None


def rest_of(group: str, taken: set[str]) -> list[str]:
    """The settings of a group that no other node has, in the order of the config."""
    for one in form_groups():
        if ".".join(one.path) == group:
            own = one.path[:1] == ("method",)  # model.path and data.pairs are Train LoRA's
            names = [f"{group}.{f.name}" for f in one.fields if own or not f.required]
            return [name for name in names if name not in taken]
    raise KeyError(group)


def _inputs(widget: Widget) -> list[io.Input]:
    field, id_ = widget.field, widget.id
    if field.kind == "bool":
        return [io.Boolean.Input(id_, default=field.default, tooltip=field.text)]
    if field.kind == "int":
        return [
            io.Int.Input(
                id_,
                default=field.default,
                min=int(field.minimum or 0),
                max=int(field.maximum or 0),
                step=int(field.step or 1),
                control_after_generate=False,  # the page would give one to every seed, and train anew at each Run
                tooltip=field.text,
            )
        ]
    if field.kind == "float":
        return [
            io.Float.Input(
                id_,
                default=float(field.default),
                min=field.minimum,
                max=field.maximum,
                step=field.step,
                round=False,
                tooltip=field.text,
            )
        ]
    if field.kind == "choice":
        return [io.Combo.Input(id_, options=list(field.choices), default=field.default, tooltip=field.text)]
    if field.kind == "toggles":
        return [
            io.Boolean.Input(f"{id_}_{choice}", default=choice in field.default, tooltip=f"{choice}: {field.text}")
            for choice in field.choices
        ]
    return [io.String.Input(id_, default=field.default, multiline=field.kind == "lines", tooltip=field.text)]
