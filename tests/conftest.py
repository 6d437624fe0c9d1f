"""The order of the default tests."""

from __future__ import annotations

import pytest

LONGEST = ("test_kill.py",)  # minutes; begun first, so that no other process waits for it in the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all others in their order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
