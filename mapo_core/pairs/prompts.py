"""Lists of prompts: text with one per line, or JSON as HPD and others have them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ..errors import PairsError
from .pair import read_text

if TYPE_CHECKING:
    from pathlib import Path

_FIELDS = ("prompt", "caption", "text")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, each once, in order.

    `.json`: a list of prompts, a list of objects with "prompt" (or "caption", "text"), or an object of such lists by
    group, as HPDv2's benchmark has its styles. `.jsonl`: one of these per line. Anything else: one prompt per line;
    empty lines and lines that begin with # are left out.

    Raises:
        PairsError: the file cannot be read, or has no prompt; `problems` names the entries that are none.
    """
    text = read_text(path)
    suffix = path.suffix.lower()
    problems: list[str] = []
    if suffix in {".json", ".jsonl", ".ndjson"}:
        lines = [text] if suffix == ".json" else [line for line in text.splitlines() if line.strip()]
        try:
            values = [json.loads(line) for line in lines]
        except ValueError as error:
            raise PairsError(f"{path} is not valid JSON: {error}. Correct it, or save one prompt per line.") from error
        found = [p for value in values for p in _from_json(value, "", problems)]
    else:
        found = [line for line in text.splitlines() if not line.startswith("#")]
    if problems:
        raise PairsError(f"{path} has entries that are no prompts, for example {problems[0]}.", problems)
    prompts = list(dict.fromkeys(" ".join(p.split()) for p in found if p.strip()))
    if not prompts:
        raise PairsError(f"{path} has no prompts. Write one per line.")
    return prompts


def _from_json(value: Any, place: str, problems: list[str]) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [p for i, item in enumerate(value) for p in _from_json(item, f"{place}[{i}]", problems)]
    if isinstance(value, dict):
        for name in _FIELDS:
            if isinstance(value.get(name), str):
                return [value[name]]
        if value and all(isinstance(item, list) for item in value.values()):
            return [p for name, item in value.items() for p in _from_json(item, f"{place}.{name}", problems)]
    problems.append(f"{place or 'the file'}: {json.dumps(value, ensure_ascii=False)[:60]}")
    return []
