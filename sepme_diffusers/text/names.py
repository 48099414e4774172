"""Names as users give them."""

from __future__ import annotations

from collections.abc import Iterable


def listed(names: Iterable[str]) -> list[str]:
    """Make a list of names.

    Raises:
        TypeError: If a single string is given, whose letters would be taken for names.
    """
    if isinstance(names, str):
        raise TypeError(f"give a list of concepts: [{names!r}], not {names!r}")
    return list(names)
