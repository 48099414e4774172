"""GuardSet: the prompts that increments leave alone, named once and shared by the entries of a bank."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# Enough that two values never share a name.
_DIGITS = 16
LONGEST_CHAIN = 64
"""How many sets a chain of extensions may have. Those that are made here have some log2 of the number of prompts."""


def content_name(value: Mapping[str, Any]) -> str:
    """Name a value by what it holds: the first 16 digits of the SHA-256 of its JSON, keys sorted, without spaces."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


@dataclass(frozen=True, eq=False)
class GuardSet:
    """Prompts that increments leave alone. Immutable; two sets are equal if they hold the same in the same way.

    A bank that grows by one concept at a time names one more set each time. That set extends an earlier one, so that
    it lists a few names and not all of them.

    Args:
        exact: Prompts that lie in the null space of the increments.
        damped: Prompts that increments paid for moving, because not all of them fit exactly.
        extends: The set to which these are added.

    Raises:
        ValueError: If a prompt is there twice, or the chain of extensions is too long.

    Example:
        >>> first = GuardSet(("", "watermark", "neon"))
        >>> second = GuardSet(("pencil",), extends=first)
        >>> list(second), "neon" in second
        (['', 'watermark', 'neon', 'pencil'], True)
    """

    exact: tuple[str, ...] = ()
    damped: tuple[str, ...] = ()
    extends: GuardSet | None = None
    id: str = field(default="", init=False)
    """What the manifest calls it: the first digits of the SHA-256 of what it holds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "exact", tuple(self.exact))
        object.__setattr__(self, "damped", tuple(self.damped))
        prompts = (*self.exact, *self.damped)
        earlier = [] if self.extends is None else self.extends.chain()
        if len(earlier) >= LONGEST_CHAIN:
            raise ValueError(f"a chain of guard sets has at most {LONGEST_CHAIN} members")
        known = {prompt for part in earlier for prompt in prompts if part.has_own(prompt)}
        if known or len(self._own) < len(prompts):
            twice = known | {prompt for prompt, count in Counter(prompts).items() if count > 1}
            raise ValueError(f"a set of guards has these prompts twice: {sorted(twice)[:5]}")
        # Once: it is asked for very often, and what it is made from never changes.
        object.__setattr__(self, "id", content_name(self.to_dict()))

    @classmethod
    def of(cls, exact: Iterable[str], damped: Iterable[str] = (), known: Iterable[GuardSet] = ()) -> GuardSet:
        """Make a set, as an extension of the largest known one that it contains.

        What is extended holds at least twice what is added: where it does not, its own prompts are listed anew, and
        what it extends is extended. So chains stay short, and n sets of 1 to n prompts list some n log2(n) in all.

        Args:
            exact: See the class.
            damped: See the class.
            known: Sets that may be extended.
        """
        rest = [dict.fromkeys(exact), dict.fromkeys(damped)]
        largest_first = sorted(dict.fromkeys(known), key=len, reverse=True)
        best = next((candidate for candidate in largest_first if candidate.is_in(*rest)), None)
        rest = [{p: None for p in prompts if best is None or p not in best} for prompts in rest]
        if best is not None and not any(rest):
            return best
        while best is not None and best.n_own < 2 * sum(map(len, rest)):
            rest = [dict.fromkeys((*own, *more)) for own, more in zip((best.exact, best.damped), rest, strict=True)]
            best = best.extends
        return cls(tuple(rest[0]), tuple(rest[1]), best)

    def is_in(self, exact: Container[str], damped: Container[str]) -> bool:
        """Tell whether all prompts of the set are among these."""
        pairs = ((self.all_exact, exact), (self.all_damped, damped))
        return all(prompt in known for own, known in pairs for prompt in own)

    def to_dict(self) -> dict[str, Any]:
        """Give the set as plain values; what it extends is named by its id."""
        values: dict[str, Any] = {"exact": list(self.exact)}
        if self.damped:
            values["damped"] = list(self.damped)
        if self.extends is not None:
            values["extends"] = self.extends.id
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], known: Mapping[str, GuardSet]) -> GuardSet:
        """Read the set that `to_dict` wrote.

        Args:
            values: The plain values.
            known: The sets that it may extend, by id.

        Raises:
            ValueError: See the class.
        """
        extends = known[values["extends"]] if "extends" in values else None
        return cls(tuple(values["exact"]), tuple(values.get("damped", ())), extends)

    def chain(self) -> list[GuardSet]:
        """Return the set and all that it extends, the first one first."""
        sets: list[GuardSet] = []
        step: GuardSet | None = self
        while step is not None:
            sets.append(step)
            step = step.extends
        return sets[::-1]

    @property
    def all_exact(self) -> Iterator[str]:
        """The prompts that lie in the null space, those of the extended sets included."""
        return (prompt for part in self.chain() for prompt in part.exact)

    @property
    def all_damped(self) -> Iterator[str]:
        """The prompts that are damped, those of the extended sets included."""
        return (prompt for part in self.chain() for prompt in part.damped)

    def has_own(self, prompt: str) -> bool:
        """Tell whether the set itself adds a prompt to those of the sets that it extends."""
        return prompt in self._own

    @property
    def n_own(self) -> int:
        """How many prompts the set itself adds."""
        return len(self._own)

    @cached_property
    def _own(self) -> frozenset[str]:
        return frozenset((*self.exact, *self.damped))

    def __contains__(self, prompt: object) -> bool:
        return any(prompt in part._own for part in self.chain())

    def __iter__(self) -> Iterator[str]:
        return (prompt for prompts in (self.all_exact, self.all_damped) for prompt in prompts)

    def __len__(self) -> int:
        return sum(len(part._own) for part in self.chain())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GuardSet) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)


@dataclass(frozen=True)
class Guarded(Collection[str]):
    """What an increment leaves alone: the prompts of a guard set, but for its own concept's name.

    Args:
        set: The set, which other entries share.
        own: The name.
    """

    set: GuardSet
    own: str

    @property
    def exact(self) -> Iterator[str]:
        """The prompts that lie in the null space of the increment."""
        return (prompt for prompt in self.set.all_exact if prompt != self.own)

    @property
    def damped(self) -> Iterator[str]:
        """The prompts that the increment paid for moving."""
        return (prompt for prompt in self.set.all_damped if prompt != self.own)

    def __contains__(self, prompt: object) -> bool:
        return prompt != self.own and prompt in self.set

    def __iter__(self) -> Iterator[str]:
        return (prompt for prompt in self.set if prompt != self.own)

    def __len__(self) -> int:
        return len(self.set) - (self.own in self.set)
