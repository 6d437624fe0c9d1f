"""Writes docs/settings.md from the fields of TrainConfig and the docstrings under them.

.venv/bin/python scripts/settings_doc.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "settings.md"
INTRODUCTION = """\
# Settings

Written by `scripts/settings_doc.py` from `mapo_core/config.py`; edit that file, not this one.

Every setting can stand in a config file (JSON, or YAML with `.yaml`) and on the command line as `--group.name value`;
the command line wins. A run keeps its complete settings as `config.json` in its folder.

```sh
./mapo train --model demo --chosen pictures/new --rejected pictures/old --name trial --config settings.yaml \\
    --adapter.rank 16 --optimizer.learning_rate 1e-4
```
"""
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "multiple_of": "a multiple of {}"}


def main() -> None:
    """Write the file."""
    TARGET.write_text(settings_markdown(), encoding="utf-8", newline="\n")
    print(f"wrote {TARGET}")


def settings_markdown() -> str:
    """The whole document: one table per group of settings."""
    from pydantic import BaseModel

    from mapo_core.config import TrainConfig

    top, groups = [], []
    for name, field in TrainConfig.model_fields.items():
        models = [part for part in alternatives(field.annotation) if is_model(part, BaseModel)]
        if not models:
            top.append(row(name, field))
        for model in models:
            heading = f"## {name}"
            if len(models) > 1:
                heading += f", `--{name}.type {model.model_fields['type'].default}`"
            rows = [row(f"{name}.{inner}", f) for inner, f in model.model_fields.items() if not is_tag(f)]
            groups.append(table(heading, (model.__doc__ or "").strip(), rows))
    return "\n".join([INTRODUCTION, table("## The run", (TrainConfig.__doc__ or "").strip(), top), *groups])


def is_tag(field: Any) -> bool:
    """Whether a field has one value only, the one that the heading names."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


def table(heading: str, introduction: str, rows: list[str]) -> str:
    """One group."""
    if not rows:
        return f"{heading}\n\n{introduction}\n"
    head = "| setting | values | default | meaning |\n|---|---|---|---|"
    return "\n".join([heading, "", introduction, "", head, *rows, ""])


def row(name: str, field: Any) -> str:
    """One setting."""
    text = "" if field.is_required() else shown(field.default)
    default = "required" if field.is_required() else f"`{text}`" if text else "empty"
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | {values(field)} | {default} | {cell(meaning)} |"


def values(field: Any) -> str:
    """What a setting takes: its type, and its bounds."""
    bounds = [
        text.format(shown(limit))
        for constraint in field.metadata
        for key, text in BOUNDS.items()
        if (limit := getattr(constraint, key, None)) is not None
    ]
    return cell(", ".join([type_name(field.annotation), *bounds]))


def type_name(annotation: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{shown(value)}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(type_name(part) for part in arguments)
    if origin is tuple:
        return "list of " + type_name(arguments[0])
    if annotation is NoneType:
        return "`none`"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "`true`, `false`", "Path": "path"}[
        annotation.__name__
    ]


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the type itself."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def is_model(annotation: Any, base: type) -> bool:
    """Whether a type is a group of settings."""
    return isinstance(annotation, type) and issubclass(annotation, base)


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(shown(item) for item in value)
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:g}"
    return str(value)


def cell(text: str) -> str:
    """Text that does not end its table cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
