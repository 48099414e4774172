"""Names as users give them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

Name = TypeVar("Name")


def listed(names: Iterable[Name]) -> list[Name]:
    """Make a list of names, or of what has one.

    Raises:
        TypeError: If a single string is given, whose letters would be taken for names.
    """
    if isinstance(names, str):
        raise TypeError(f"give a list of concepts: [{names!r}], not {names!r}")
    return list(names)
