"""All settings as widgets, made from TrainConfig's own fields, and back."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mapo_core import METHODS, FormField, FormGroup, form_groups

Key = tuple[str, ...]

HIDDEN: frozenset[Key] = frozenset(
    {("name",), ("parent",), ("model", "path"), ("data", "pairs")}
)  # asked for elsewhere
BASIC: tuple[Key, ...] = (("training", "steps"), ("memory", "plan"))  # widgets that stand outside of Advanced
_LABELS: dict[Key, str] = {("memory", "plan"): "Memory plan"}  # where the name alone says too little
_TITLES = {
    (): "General",
    ("model",): "Model",
    ("data",): "Data",
    ("adapter",): "LoRA",
    ("optimizer",): "Optimizer",
    ("training",): "Training",
}


class SettingsForm:
    """The widgets of all settings; `values` and `updates` go between them and nested settings."""

    def __init__(self, start: dict[str, Any]) -> None:
        """Read the fields; nothing is drawn yet.

        Args:
            start: settings that the widgets show at first, where they are not the defaults.
        """
        self.start = start
        self.groups = form_groups()
        self.fields: dict[Key, FormField] = {
            (*group.path, field.name): field
            for group in self.groups
            for field in group.fields
            if (*group.path, field.name) not in HIDDEN
        }
        self.widgets: dict[Key, Any] = {}
        self.method: gr.Dropdown | None = None
        self.boxes: dict[Key, gr.Accordion] = {}

    def draw_basic(self, *keys: Key) -> None:
        """Draw single fields where the page wants them."""
        for key in keys:
            if key in self.fields:
                self.widgets[key] = self._widget(key)

    def draw_rest(self) -> None:
        """Draw everything else: a folded box per group, and a search over all of them."""
        search = gr.Textbox(
            label="Search settings", placeholder="for example: rank, memory, noise", elem_id="search-settings"
        )
        method = self.start.get("method", {}).get("type", "mapo")
        self.method = gr.Dropdown(list(METHODS), value=method, label="Method", info="How pairs become a loss.")
        for group in self.groups:
            keys = [key for key in self.fields if key[:-1] == group.path and key not in self.widgets]
            if not keys:
                continue
            visible = group.path[:1] != ("method",) or group.path == ("method", method)
            with gr.Accordion(_title(group), open=False, visible=visible) as box:
                gr.Markdown(group.text)
                for start in range(0, len(keys), 2):
                    with gr.Row(elem_classes="mapo-fields"):
                        for key in keys[start : start + 2]:
                            self.widgets[key] = self._widget(key)
            self.boxes[group.path] = box
        outputs = [*self.boxes.values(), *(self.widgets[key] for key in self._searched())]
        for event in (search.change, self.method.change):
            event(
                self._found,
                [search, self.method],
                outputs,
                api_visibility="private",
                show_progress="hidden",
                trigger_mode="always_last",
            )

    def _searched(self) -> list[Key]:
        return [key for key in self.widgets if key[:-1] in self.boxes and key not in BASIC]

    def _found(self, words: str, method: str) -> list[Any]:
        wanted = words.lower().split()

        def fits(key: Key) -> bool:
            text = f"{' '.join(key)} {self.fields[key].text}".lower().replace("_", " ")
            return all(word.replace("_", " ") in text for word in wanted)

        hits = {key: fits(key) for key in self._searched()}
        boxes = []
        for path in self.boxes:
            some = any(hit for key, hit in hits.items() if key[:-1] == path)
            own = path[:1] != ("method",) or path == ("method", method)
            boxes.append(gr.update(visible=some and own, open=bool(wanted) and some))
        return [*boxes, *(gr.update(visible=hit) for hit in hits.values())]

    @property
    def inputs(self) -> list[Any]:
        """The widgets whose values `values` takes, in its order."""
        return [self.method, *self.widgets.values()]

    def values(self, given: tuple[Any, ...] | list[Any]) -> dict[str, Any]:
        """Nested settings of what differs from the defaults.

        Raises:
            ConfigError: a text that should hold numbers does not.
        """
        method, *rest = given
        settings: dict[str, Any] = {"method": {"type": method}}
        for key, value in zip(self.widgets, rest, strict=True):
            field = self.fields[key]
            if key[:1] == ("method",) and key[1] != method:
                continue
            if value is None or value == _default(field):
                continue
            group = settings
            for part in field.path[:-1]:
                group = group.setdefault(part, {})
            group[field.name] = field.to_setting(value)
        return settings

    def updates(self, settings: dict[str, Any]) -> list[Any]:
        """What to put into `inputs` so that they show these settings, and defaults where there are none."""
        method = (settings.get("method") or {}).get("type", "mapo")
        shown = []
        for key in self.widgets:
            foreign = key[:1] == ("method",) and key[1] != method
            shown.append(_default(self.fields[key]) if foreign else _shown(self.fields[key], settings))
        return [method, *shown]

    def _widget(self, key: Key) -> Any:
        return _widget(self.fields[key], key, _shown(self.fields[key], self.start))


def _shown(field: FormField, settings: dict[str, Any]) -> Any:
    """The form's value of a setting, its default where the settings have none."""
    value: Any = settings
    for part in field.path:
        if not isinstance(value, dict) or part not in value:
            return _default(field)
        value = value[part]
    return field.to_form(value)


def _default(field: FormField) -> Any:
    if field.kind == "toggles":
        return list(field.default)
    return field.default


def _title(group: FormGroup) -> str:
    if group.path[:1] == ("method",):
        return f"Method: {group.path[1]}"
    return _TITLES.get(group.path) or group.path[-1].replace("_", " ").capitalize()


def _label(key: Key) -> str:
    words = _LABELS.get(key) or key[-1].replace("_", " ")
    return words[:1].upper() + words[1:]


def _widget(field: FormField, key: Key, value: Any) -> Any:
    common: dict[str, Any] = {
        "label": _label(key),
        "info": field.text,
        "elem_id": "set-" + "-".join(key),
        "interactive": True,
        "min_width": 220,
    }
    if field.kind in ("int", "float"):
        return gr.Number(
            value=value,
            precision=0 if field.kind == "int" else None,
            minimum=field.minimum,
            maximum=field.maximum,
            step=field.step or 1,
            **common,
        )
    if field.kind == "bool":
        return gr.Checkbox(value=bool(value), **common)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=value, **common)
    if field.kind == "toggles":
        return gr.CheckboxGroup(list(field.choices), value=value, **common)
    return gr.Textbox(value=value or "", lines=3 if field.kind == "lines" else 1, **common)
