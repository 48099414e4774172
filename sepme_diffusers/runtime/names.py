"""What users call the concepts of the loaded banks, and erased sets as they give them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from sepme_diffusers.text.names import listed

Key = tuple[str, str]
"""(bank, concept)."""


class Names:
    """The concepts of several banks by name: "concept", or "bank/concept" where banks share a name.

    Args:
        banks: {bank name: its concepts, in order}.

    Example:
        >>> names = Names({"styles": ["neon", "pencil"], "mine": ["neon"]})
        >>> names.shown
        {('styles', 'neon'): 'styles/neon', ('styles', 'pencil'): 'pencil', ('mine', 'neon'): 'mine/neon'}
        >>> names.strengths(["pencil"])
        {('styles', 'pencil'): 1.0}
    """

    def __init__(self, banks: Mapping[str, Iterable[str]]) -> None:
        keys = [(bank, concept) for bank, concepts in banks.items() for concept in concepts]
        holders: dict[str, list[Key]] = {}
        for key in keys:
            holders.setdefault(key[1], []).append(key)
        self._several = {name: ["/".join(key) for key in found] for name, found in holders.items() if len(found) > 1}
        self.shown = {key: "/".join(key) if key[1] in self._several else key[1] for key in keys}
        self._keys = {"/".join(key): key for key in keys}
        self._keys |= {name: found[0] for name, found in holders.items() if len(found) == 1}

    def keys(self, names: Iterable[str]) -> list[Key]:
        """The concepts of these names.

        Raises:
            TypeError: If a name is no string.
            ValueError: If a name is unknown (with the nearest one), given twice, or shared by two banks.
        """
        names = list(names)
        if strange := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"concepts are named by strings, not {strange}")
        if shared := {name: self._several[name] for name in names if name in self._several}:
            raise ValueError(f"more than one loaded bank has these concepts; say which: {shared}")
        if unknown := [name for name in names if name not in self._keys]:
            raise ValueError(f"unknown concepts {unknown}.{self._hints(unknown)} Loaded: {list(self.shown.values())}")
        keys = [self._keys[name] for name in names]
        if len(set(keys)) != len(keys):
            raise ValueError(
                f"concepts given twice: {sorted({self.shown[key] for key in keys if keys.count(key) > 1})}"
            )
        return keys

    def _hints(self, unknown: list[str]) -> str:
        near = {name: difflib.get_close_matches(name, self._keys, 1) for name in unknown}
        return "".join(f" Did you mean {match[0]!r} for {name!r}?" for name, match in near.items() if match)

    def strengths(self, concepts: Iterable[str] | Mapping[str, float]) -> dict[Key, float]:
        """An erased set as {concept: strength}.

        Args:
            concepts: Names, or {name: strength}.

        Raises:
            TypeError: If a single string is given, or a name is no string.
            ValueError: As `keys`, or if a strength is not a finite number above zero.
        """
        if not isinstance(concepts, Mapping):
            return dict.fromkeys(self.keys(listed(concepts)), 1.0)
        keys = self.keys(concepts)
        if bad := {name: strength for name, strength in concepts.items() if not _is_strength(strength)}:
            raise ValueError(f"a strength is a finite number above zero, not {bad}; leave a concept out to restore it")
        return {key: float(strength) for key, strength in zip(keys, concepts.values(), strict=True)}


def _is_strength(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < value < float("inf")
