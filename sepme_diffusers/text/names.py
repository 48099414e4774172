"""Names as users give them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

Name = TypeVar("Name")


def some(names: Iterable[Any], most: int = 20) -> str:
    """Show the first of many names, and count the rest, for a message.

    Example:
        >>> some(["cat", "dog", "fox"], most=2)
        "['cat', 'dog'] and 1 more"
    """
    names = list(names)
    return f"{names[:most]}" + (f" and {len(names) - most} more" if len(names) > most else "")


def listed(names: Iterable[Name]) -> list[Name]:
    """Make a list of names, or of what has one.

    Raises:
        TypeError: If a single string is given, whose letters would be taken for names.
    """
    if isinstance(names, str):
        raise TypeError(f"give a list of concepts: [{names!r}], not {names!r}")
    return list(names)
