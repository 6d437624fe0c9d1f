"""Every setting as a form needs it: kind of widget, default, range, choices and text, from TrainConfig itself.

The ComfyUI nodes and the browser's forms are built from this, so they cannot drift apart from the settings.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from .config import TrainConfig
from .errors import ConfigError

Kind = Literal["int", "float", "bool", "choice", "toggles", "text", "lines", "numbers"]

AUTO = "auto"
_LARGEST = {"int": 2**53 - 1, "float": 1e9}  # where the settings have no bound; JavaScript counts exactly to 2**53


@dataclass(frozen=True)
class FormField:
    """One setting.

    Attributes:
        path: where it stands, for example ("optimizer", "learning_rate").
        kind: "toggles" is a set of choices, "lines" a list of texts, "numbers" a fixed number of numbers.
        default: in the form's terms; for an automatic value what `automatic` says.
        automatic: the form's value for None, or None where the setting has no None.
        minimum, maximum, step: of numbers; the minimum leaves room for `automatic`.
        choices: of "choice" and "toggles".
        text: what the setting means.
        required: there is no default; a form has to be filled in.
    """

    path: tuple[str, ...]
    kind: Kind
    default: Any
    text: str
    automatic: Any = None
    minimum: float | None = None
    maximum: float | None = None
    step: float | None = None
    choices: tuple[str, ...] = ()
    required: bool = False

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path[-1]

    def to_setting(self, value: Any) -> Any:
        """A form's value as the settings take it.

        Raises:
            ConfigError: text that should hold numbers does not.
        """
        if self.automatic is not None and value == self.automatic:
            return None
        if self.kind == "lines":
            return [line.strip() for line in str(value).splitlines() if line.strip()]
        if self.kind == "numbers":
            try:
                return [float(part) for part in str(value).replace(",", " ").split()]
            except ValueError:
                raise ConfigError(
                    f"{'.'.join(self.path)}: {value!r} is not a list of numbers such as 0.9, 0.999."
                ) from None
        if self.kind == "choice" and self.automatic is not None:
            return {"on": True, "off": False}.get(value, value)
        return value

    def to_form(self, value: Any) -> Any:
        """A setting as the form shows it; the other way round than `to_setting`."""
        if value is None:
            return self.automatic if self.automatic is not None else _shown(None, self.kind)
        if self.kind == "choice" and isinstance(value, bool):
            return "on" if value else "off"
        if self.kind == "toggles":
            return list(value)
        if self.kind in ("text", "choice"):
            return str(value)
        return _shown(value, self.kind)


@dataclass(frozen=True)
class FormGroup:
    """One group of settings.

    Attributes:
        path: ("optimizer",), or ("method", "mapo") for the settings of a method.
        text: what the group is.
        fields: its settings, in the order of TrainConfig.
    """

    path: tuple[str, ...]
    text: str
    fields: tuple[FormField, ...] = field(default=())


def form_groups() -> list[FormGroup]:
    """All groups in the order of TrainConfig; the first, with an empty path, holds what belongs to the run itself."""
    top: list[FormField] = []
    groups: list[FormGroup] = []
    for name, info in TrainConfig.model_fields.items():
        models = [m for m in _alternatives(info.annotation) if isinstance(m, type) and issubclass(m, BaseModel)]
        if not models:
            if not _is_tag(info):
                top.append(_form_field((name,), info))
            continue
        for model in models:
            tag = (model.model_fields["type"].default,) if len(models) > 1 else ()
            fields = tuple(_form_field((name, inner), i) for inner, i in model.model_fields.items() if not _is_tag(i))
            groups.append(FormGroup((name, *tag), " ".join((model.__doc__ or "").split()), fields))
    return [FormGroup((), " ".join((TrainConfig.__doc__ or "").split()), tuple(top)), *groups]


def form_field(*path: str) -> FormField:
    """One setting by its path; ("method", "mapo", "beta") for one of a method.

    Raises:
        KeyError: there is no such setting.
    """
    for group in form_groups():
        for one in group.fields:
            if (*group.path, one.name) == path:
                return one
    raise KeyError(".".join(path))


def _form_field(path: tuple[str, ...], info: Any) -> FormField:
    kinds = [a for a in _alternatives(info.annotation) if a is not NoneType]
    optional = len(kinds) < len(_alternatives(info.annotation))
    kind, choices = _kind(kinds[0])
    bounds = {
        key: getattr(m, key)
        for m in info.metadata
        for key in ("ge", "gt", "le", "lt", "multiple_of")
        if hasattr(m, key)
    }
    bounds = {key: value for key, value in bounds.items() if value is not None}
    text = " ".join((info.description or "").split())
    default = None if info.is_required() else info.get_default(call_default_factory=True)
    automatic: Any = None
    minimum = maximum = step = None
    if kind in ("int", "float"):
        step = bounds.get("multiple_of") or (1 if kind == "int" else _fine_step(default, bounds))
        minimum = bounds.get("ge", bounds["gt"] + step if "gt" in bounds else -_LARGEST[kind])
        maximum = bounds.get("le", bounds["lt"] - step if "lt" in bounds else _LARGEST[kind])
        maximum = min(maximum, _LARGEST[kind])
        if optional:
            automatic = 0 if minimum > 0 else -1
            minimum = automatic
    elif optional and kind == "bool":
        kind, choices, automatic = "choice", (AUTO, "on", "off"), AUTO
    elif optional and kind == "choice":
        choices, automatic = (AUTO, *choices), AUTO
    elif optional:
        automatic = ""
    if optional:
        text = _of_the_form(text, str(automatic) or "Empty")
    return FormField(
        path=path,
        kind=kind,
        default=automatic if default is None and optional else _shown(default, kind),
        text=text,
        automatic=automatic,
        minimum=minimum,
        maximum=maximum,
        step=step,
        choices=choices,
        required=info.is_required(),
    )


def _of_the_form(text: str, automatic: str) -> str:
    """The text with the form's word for None, which a form cannot show."""
    if "None" in text:
        return re.sub(r"\bNone\b", automatic, text)
    return f"{text} {automatic}: automatic."


def _kind(annotation: Any) -> tuple[Kind, tuple[str, ...]]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "choice", tuple(map(str, arguments))
    if origin is tuple:
        if get_origin(arguments[0]) is Literal:
            return "toggles", tuple(map(str, get_args(arguments[0])))
        return ("lines", ()) if arguments[0] is str else ("numbers", ())
    kinds: dict[Any, Kind] = {bool: "bool", int: "int", float: "float", str: "text", Path: "text"}
    return kinds[annotation], ()


def _shown(value: Any, kind: Kind) -> Any:
    if value is None:
        return "" if kind in ("text", "lines", "numbers") else None
    if kind == "lines":
        return "\n".join(value)
    if kind == "numbers":
        return ", ".join(f"{v:g}" for v in value)
    return value


def _fine_step(default: float | None, bounds: dict[str, float]) -> float:
    """A step of a hundredth of the default's size, at most 0.01 where the range is small."""
    size = abs(default) if default else 1.0
    step = 10.0 ** (math.floor(math.log10(size)) - 2)
    return min(step, 0.01) if bounds.get("le", bounds.get("lt", math.inf)) <= 10 or size < 10 else step


def _is_tag(info: Any) -> bool:
    """Whether a setting has one value only."""
    return get_origin(info.annotation) is Literal and len(get_args(info.annotation)) == 1


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]
