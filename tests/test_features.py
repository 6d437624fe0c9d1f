"""docs/features.md names tests and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mapo_core import form_groups

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)))
SECTIONS = {group.path[0] for group in form_groups() if group.path}


def rows() -> list[list[str]]:
    """The cells of every row that describes a feature."""
    lines = [line for line in TEXT.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[0] != "feature" and not set(row[0]) <= set("-")]


def test_every_row_is_complete_and_names_a_test() -> None:
    assert rows()
    for row in rows():
        assert len(row) == 5, row
        assert all(row[:4]), row
        assert re.search(r"`tests/[\w/]+\.py::\w+`", row[3]), row


@pytest.mark.parametrize(("path", "name"), TESTS)
def test_the_test_exists(path: str, name: str) -> None:
    assert re.search(rf"^(?:async )?def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_the_settings_exist() -> None:
    known = {".".join(field.path) for group in form_groups() for field in group.fields}
    known |= {"method.type"}
    named = {name for row in rows() for name in re.findall(r"`([a-z_]+\.[a-z_]+)`", row[1])}
    wrong = {name for name in named if name.split(".")[0] in SECTIONS and name not in known}
    assert not wrong
