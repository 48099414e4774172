"""Guarantees: what a bank promises for guarded prompts, looked up one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from sepme_diffusers.bank.entry import Guarantee, Outline
from sepme_diffusers.bank.guard_sets import GuardSet


class Guarantees(Mapping[str, Guarantee]):
    """What a bank promises for each guarded prompt and each concept's name, whichever concepts are erased.

    Args:
        outlines: The bank's.
    """

    def __init__(self, outlines: Mapping[str, Outline]) -> None:
        self._outlines = outlines

    def __getitem__(self, prompt: str) -> Guarantee:
        if prompt not in self._prompts:
            raise KeyError(f"no increment of this bank guards {prompt!r}, and it is no concept's name")
        unaware: list[str] = []
        listed = {name: leak for name, leak in self._listed.get(prompt, {}).items() if name != prompt}
        leakage = max(listed.values(), default=0.0)
        # What is read of it at most, of any gate; None where nothing is.
        read: float | None = None
        held: dict[GuardSet, bool] = {}
        damped: dict[GuardSet, bool] = {}
        for part in self._parts:
            earlier = part.extends
            held[part] = part.has_own(prompt) or (earlier is not None and held[earlier])
            damped[part] = prompt in part.damped or (earlier is not None and damped[earlier])
        for guards, names in self._by_set.items():
            if not held[guards]:
                unaware += [name for name in names if name != prompt]
            elif damped[guards]:
                rest = (leak for leak, name in self._rest[guards] if name != prompt and name not in listed)
                leakage = max(leakage, next(rest, 0.0))
                shares = (share for share, name in self._shares[guards] if name != prompt)
                if (share := next(shares, None)) is not None:
                    read = max(read or 0.0, share)
        in_order = tuple(sorted(unaware, key=self._places.__getitem__))
        if leakage or in_order:
            return Guarantee(None, leakage, in_order)
        return Guarantee("null space", 0.0, ()) if read is None else Guarantee("gate", 0.0, (), round(1 - read, 3))

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)

    @cached_property
    def _places(self) -> dict[str, int]:
        """Where each concept stands in the bank's order."""
        return {name: place for place, name in enumerate(self._outlines)}

    @cached_property
    def _by_set(self) -> dict[GuardSet, list[str]]:
        """The concepts by the set that guards them."""
        groups: dict[GuardSet, list[str]] = {}
        for name, outline in self._outlines.items():
            groups.setdefault(outline.guards.set, []).append(name)
        return groups

    @cached_property
    def _parts(self) -> list[GuardSet]:
        """Every set and what it extends, each once, and after what it extends."""
        return list(dict.fromkeys(part for guards in self._by_set for part in guards.chain()))

    @cached_property
    def _prompts(self) -> dict[str, None]:
        guarded = (prompt for part in self._parts for prompt in (*part.exact, *part.damped))
        return dict.fromkeys([*guarded, *self._outlines])

    @cached_property
    def _listed(self) -> dict[str, dict[str, float]]:
        """What each prompt leaks that some increment is known to move: {prompt: {concept: leak}}."""
        listed: dict[str, dict[str, float]] = {}
        for name, outline in self._outlines.items():
            for prompt, leak in outline.metrics.get("leakage_of", {}).items():
                listed.setdefault(prompt, {})[name] = leak
        return listed

    @cached_property
    def _rest(self) -> dict[GuardSet, list[tuple[float, str]]]:
        """The bounds for damped prompts that are not listed, by set: (leak, concept), the largest first."""
        return self._largest_first("leakage_rest")

    @cached_property
    def _shares(self) -> dict[GuardSet, list[tuple[float, str]]]:
        """What damped prompts read of gates that they leave shut, by set: (share, concept), the largest first."""
        return self._largest_first("gate_share")

    def _largest_first(self, metric: str) -> dict[GuardSet, list[tuple[float, str]]]:
        return {
            guards: sorted(((self._outlines[name].metrics.get(metric, 0.0), name) for name in names), reverse=True)
            for guards, names in self._by_set.items()
        }
