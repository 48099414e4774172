"""Snapshot: the banks that are loaded and what of them is erased, as one value that never changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import Entry, Outline
from sepme_diffusers.doors.attachment import ErasureNotInForce
from sepme_diffusers.doors.family import TOKENS
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.runtime.active import ActiveSet
from sepme_diffusers.runtime.erased_sets import Key, Names, Strengths
from sepme_diffusers.runtime.spelled import Spelled
from sepme_diffusers.runtime.stack import ActiveStack, Stack
from sepme_diffusers.runtime.vocabularies import Vocabularies
from sepme_diffusers.text.names import some

MODULE = "module"
"""Where per-module increments are stacked; text-side ones are stacked by door."""


@dataclass(frozen=True)
class LoadOptions:
    """What a host asked for when it loaded a bank.

    Args:
        strict: Every pass needs an explicit set; embeddings and image prompts from the caller are refused while
            something is erased.
        allow_embeddings: ... but embeddings are allowed.
        allow_images: ... but image prompts are allowed.
        plain_pipelines: Passes outside a call of an attached pipeline run under the standing set instead of being
            refused.
        vocabularies: Those of the pipeline's text encoders when it was loaded, where embeddings are refused.
    """

    strict: bool = False
    allow_embeddings: bool = False
    allow_images: bool = False
    plain_pipelines: bool = False
    vocabularies: Vocabularies | None = None


class Stacks:
    """The stacked factors of all loaded increments; made when they are first needed, by whichever thread.

    Args:
        outlines: Of all loaded banks, in the one order in which they are added up. Numbers are read when an increment
            is first stacked.
    """

    def __init__(self, outlines: Mapping[Key, Outline]) -> None:
        self._outlines, self._groups = outlines, _grouped(outlines)
        # Of what is in memory already; of the rest when it is read.
        self._versions = {key: _versions(entry) for key, entry in outlines.items() if isinstance(entry, Entry)}
        self._known: dict[tuple[str, tuple[Key, ...], int | None], Stack] = {}

    @property
    def groups(self) -> list[str]:
        """Where increments act: doors, and `MODULE`."""
        return list(self._groups)

    def get(self, group: str, asked: Iterable[Key], fixed_shape: bool) -> Stack | None:
        """Return the stack of a group: all of its increments while they are few, else those that are asked for.

        Args:
            group: A door, or `MODULE`.
            asked: The increments that must be in it.
            fixed_shape: A compiled graph must not change with the set: then the empty set has a stack too, with a mask
                of zeros, and stacks of few increments are filled up.
        """
        ranks = self._groups[group]
        chosen = [key for key in ranks if key in set(asked)]
        if not chosen and not fixed_shape:
            return None
        chosen, width = chosen or [next(iter(ranks))], None
        d = self._part(group, chosen[0]).A.shape[1]
        if sum(ranks.values()) <= d:
            chosen = list(ranks)
        elif fixed_shape:
            width = d
            while width < sum(ranks[key] for key in chosen):
                width *= 2
        identity = (group, tuple(chosen), width)
        if (known := self._known.get(identity)) is not None:
            return known
        self._refuse_changed(chosen)
        stack = Stack({key: self._part(group, key) for key in chosen}, width)
        # Sets of very many concepts come and go: keep the last few. There is no lock that an interrupt could leave
        # shut: two threads that ask at once make the same stack twice.
        self._known = {**dict(list(self._known.items())[-7:]), identity: stack}
        return stack

    def _part(self, group: str, key: Key) -> Increment:
        """What a concept's increment does at a door, or behind Linears."""
        increment = self._outlines[key].increment
        return increment if group in (TOKENS, MODULE) else increment.doors[group]

    def _refuse_changed(self, chosen: Iterable[Key]) -> None:
        now = {key: _versions(self._outlines[key]) for key in chosen}
        if changed := [key for key, versions in now.items() if self._versions.setdefault(key, versions) != versions]:
            raise ErasureNotInForce(
                f"tensors of the loaded increments {changed} were changed in place; load the bank again"
            )

    def tensors(self) -> list[Tensor]:
        """Return every tensor that is held beside the banks' own, on every device."""
        return [tensor for stack in self._known.values() for tensor in stack.tensors()]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._versions = {key: _versions(entry) for key, entry in self._outlines.items() if isinstance(entry, Entry)}


def _versions(outline: Outline) -> tuple[int, ...]:
    return tuple(-1 if tensor.is_inference() else tensor._version for tensor in outline.increment.tensors().values())


def _grouped(outlines: Mapping[Key, Outline]) -> dict[str, dict[Key, int]]:
    """Ranks by where increments act; an increment that edits several doors is in several groups."""
    groups: dict[str, dict[Key, int]] = {}
    for key, outline in outlines.items():
        for door, rank in outline.ranks.items():
            group = MODULE if door == TOKENS and outline.form == "module" else door
            groups.setdefault(group, {})[key] = rank
    return groups


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What is loaded and erased. Published by one assignment; a call holds the one that it began with.

    Args:
        banks: {name: bank}, sorted by name.
        options: {name: what its host asked for}.
        standing: The set that applies to calls without one of their own, without the floors.
        names: What the concepts are called.
        stacks: The factors.
    """

    banks: Mapping[str, ConceptBank] = field(default_factory=dict)
    options: Mapping[str, LoadOptions] = field(default_factory=dict)
    standing: Strengths = field(default_factory=dict)
    names: Names = field(default_factory=lambda: Names({}))
    stacks: Stacks = field(default_factory=lambda: Stacks({}))

    @classmethod
    def of(cls, banks: Mapping[str, ConceptBank], options: Mapping[str, LoadOptions], standing: Strengths) -> Snapshot:
        """Return the snapshot of some banks, added up in the order of their names, whichever was loaded first.

        Raises:
            ValueError: If one spelling would stand for two concepts.
        """
        banks = dict(sorted(banks.items()))
        outlines = {
            (name, concept): outline
            for name, bank in banks.items()
            for concept, outline in bank.entries.outlines().items()
        }
        return cls(banks, options, standing, Names(banks), Stacks(outlines))

    def erasing(self, standing: Strengths) -> Snapshot:
        """Return the same banks with another standing set."""
        return replace(self, standing=dict(standing))

    @cached_property
    def floors(self) -> dict[Key, float]:
        """What the loaded banks always erase."""
        return {(name, concept): 1.0 for name, bank in self.banks.items() for concept in bank.always}

    @property
    def strict(self) -> bool:
        """Whether a host asked for the strict rules."""
        return any(options.strict for options in self.options.values())

    @property
    def allow_embeddings(self) -> bool:
        """Whether every strict host allows embeddings from the caller."""
        return all(options.allow_embeddings for options in self.options.values() if options.strict)

    @property
    def allow_images(self) -> bool:
        """Whether every strict host allows image prompts."""
        return all(options.allow_images for options in self.options.values() if options.strict)

    @property
    def vocabularies(self) -> list[Vocabularies]:
        """Those that must not have changed since a bank was loaded."""
        return [option.vocabularies for option in self.options.values() if option.vocabularies is not None]

    @property
    def plain_pipelines(self) -> bool:
        """Whether every host lets plain pipelines run under the standing set."""
        return all(options.plain_pipelines for options in self.options.values())

    @property
    def has_per_module(self) -> bool:
        """Whether an increment acts behind Linears."""
        return MODULE in self.stacks.groups

    def increment(self, key: Key) -> Increment:
        """Return the increment of a concept."""
        return self.banks[key[0]][key[1]].increment

    def ordered(self, strengths: Strengths) -> dict[Key, float]:
        """Return a set in the order in which increments are added up."""
        return {key: strengths[key] for key in self.names.shown if key in strengths}

    def active(
        self,
        rows: Sequence[Strengths],
        pictures: int = 1,
        fixed_shape: bool = False,
        least: float = 0.0,
        spelled: Spelled = (),
    ) -> ActiveSet | None:
        """Return what acts on a batch with these sets, one for the whole batch or one per picture; None for nothing.

        Args:
            rows: The sets.
            pictures: How many pictures the record of gates tells apart.
            fixed_shape: See `Stacks.get`.
            least: See `ActiveStack`.
            spelled: The concepts that the prompt of each picture spells.
        """
        asked = {key for strengths in rows for key in strengths}
        active: dict[str, ActiveStack] = {}
        for group in self.stacks.groups:
            stack = self.stacks.get(group, asked, fixed_shape)
            if stack is not None:
                own = [{key: s for key, s in strengths.items() if key in stack.slices} for strengths in rows]
                active[group] = ActiveStack(stack, stack.mask(own), pictures, least, stack.opened_for(spelled))
        held = {key for part in active.values() for key in part.stack.slices}
        if unheld := sorted(asked - held):
            raise KeyError(f"not loaded: {unheld}; loaded: {some(self.names.shown)}")
        module = active.pop(MODULE, None)
        return ActiveSet(active, module) if active or module is not None else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        return self
