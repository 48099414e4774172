"""Erased sets as users give them: names of the concepts of the loaded banks, and strengths."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from sepme_diffusers.text.names import listed, some
from sepme_diffusers.text.spelling import look_alikes

Key = tuple[str, str]
"""(bank, concept)."""
Strengths = Mapping[Key, float]
"""An erased set: the strength of each concept in it."""

# Beyond these a strength makes numbers that float32 cannot hold, or that act on nothing.
LEAST_STRENGTH, MOST_STRENGTH = 2.0**-20, 2.0**10


class UnknownConceptError(ValueError):
    """An erased set names a concept that no loaded bank has, or that several have."""


class Names:
    """The concepts of several banks by name: "concept", or "bank/concept" where banks share a name.

    A name that looks like one of another bank must be written with its bank, too.

    Args:
        banks: {bank name: its concepts, in order}.

    Raises:
        ValueError: If a bank's name has a "/", or one spelling would stand for two concepts.

    Example:
        >>> names = Names({"styles": ["neon", "pencil"], "mine": ["neon"]})
        >>> names.shown
        {('styles', 'neon'): 'styles/neon', ('styles', 'pencil'): 'pencil', ('mine', 'neon'): 'mine/neon'}
        >>> names.strengths(["pencil"])
        {('styles', 'pencil'): 1.0}
    """

    def __init__(self, banks: Mapping[str, Iterable[str]]) -> None:
        if slashed := [bank for bank in banks if "/" in bank or not bank]:
            raise ValueError(f"a bank is loaded under a name that is not empty and has no '/', not {slashed}")
        keys = [(bank, concept) for bank, concepts in banks.items() for concept in concepts]
        alike: dict[str, list[Key]] = {}
        for group in look_alikes([concept for _, concept in keys]):
            alike |= {name: [key for key in keys if key[1] in group] for name in group}
        self._several = {name: ["/".join(key) for key in group] for name, group in alike.items()}
        self.shown = {key: "/".join(key) if key[1] in self._several else key[1] for key in keys}
        self._keys: dict[str, Key] = {}
        for key in keys:
            for spelling in {"/".join(key), self.shown[key]}:
                if self._keys.setdefault(spelling, key) != key:
                    raise ValueError(
                        f"{spelling!r} would stand for two concepts: {key[1]!r} of bank {key[0]!r} and "
                        f"{self._keys[spelling][1]!r} of bank {self._keys[spelling][0]!r}; load one of the banks "
                        "under another name="
                    )

    def keys(self, names: Iterable[str]) -> list[Key]:
        """Return the concepts of these names.

        Raises:
            TypeError: If a name is no string.
            UnknownConceptError: If a name is unknown (with the nearest one), or shared by two banks.
            ValueError: If a concept is given twice.
        """
        names = list(names)
        if strange := [name for name in names if not isinstance(name, str)]:
            raise TypeError(f"concepts are named by strings, not {strange}")
        if shared := {name: self._several[name] for name in names if name in self._several}:
            raise UnknownConceptError(
                f"more than one loaded bank has these concepts, or names like them; say which: {shared}"
            )
        if unknown := [name for name in names if name not in self._keys]:
            raise UnknownConceptError(
                f"unknown concepts {unknown}.{self._hints(unknown)} Loaded: {some(self.shown.values())}"
            )
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
        """Return an erased set as {concept: strength}.

        Args:
            concepts: Names, or {name: strength}.

        Raises:
            TypeError: If a single string is given, or a name is no string.
            ValueError: As `keys`, or if a strength is not a number from 2^-20 to 2^10.
        """
        if not isinstance(concepts, Mapping):
            return dict.fromkeys(self.keys(listed(concepts)), 1.0)
        keys = self.keys(concepts)
        if bad := {name: strength for name, strength in concepts.items() if not _is_strength(strength)}:
            raise ValueError(
                f"a strength is a finite number above zero, {LEAST_STRENGTH:.0e} to {MOST_STRENGTH:g}, not {bad}; "
                "leave a concept out to restore it"
            )
        return {key: float(strength) for key, strength in zip(keys, concepts.values(), strict=True)}


def _is_strength(value: Any) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value) and LEAST_STRENGTH <= value <= MOST_STRENGTH
    except OverflowError:  # an integer beyond any float
        return False


def with_floors(strengths: Strengths, *floors: Strengths) -> dict[Key, float]:
    """Return a set with everything that is always erased added; of two strengths the larger."""
    together = dict(strengths)
    for floor in floors:
        together |= {key: max(strength, together.get(key, 0.0)) for key, strength in floor.items()}
    return together
