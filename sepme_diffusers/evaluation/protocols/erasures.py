"""Erasures of the built-in model's styles and objects, as a user makes them: from names, with nothing tuned."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import Entry
from sepme_diffusers.bank.guard_sets import GuardSet
from sepme_diffusers.evaluation.probes import Kind
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.kinds.wording import described
from sepme_diffusers.making.regular import lexicon_of, regular_prompts
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.text.concept import BLANK, Concept
from sepme_diffusers.text.encoding import Encoded
from sepme_diffusers.text.spelling import mentions

GUARDS = (BLANK, words.WATERMARK)
"""The prompts that every increment of the evaluation leaves exactly as they were, beside names."""
KIND_OF: dict[Kind, str] = {"styles": "style", "objects": "object"}
"""What the trainer calls these kinds."""
_PRESERVED = 1000


def erase_names(
    pipe: Any,
    kind: Kind,
    names: Sequence[str],
    bank: ConceptBank | None = None,
    others: Iterable[str] = (),
    gates: bool = True,
) -> ConceptBank:
    """Add an increment for each name to a bank. Each is guarded on all other names.

    Increments that the bank already holds are left as they are, so they do not guard the new names.

    Args:
        pipe: The built-in model's pipeline, with nothing erased.
        kind: What the names are of.
        names: Styles or objects.
        bank: Default: an empty one.
        others: More names to guard.
        gates: With what a bank holds; else with what its adapters do, which have no gates.
    """
    made = SepMETrainer(pipe, guards=GUARDS, others=tuple(others)).erase(names, bank, kind=KIND_OF[kind])
    return made if gates else without_gates(made)


def without_gates(bank: ConceptBank) -> ConceptBank:
    """Put what adapters do in the place of increments that have a gate: each was solved once more for that.

    Of names they promise what was measured, for not all that a gated increment keeps exactly is exact without a gate.
    """

    def linear(entry: Entry, own: Increment) -> Entry:
        exact = tuple(prompt for prompt in entry.guard_set if prompt in GUARDS)
        guards = GuardSet(exact, tuple(prompt for prompt in entry.guard_set if prompt not in GUARDS))
        leak = entry.metrics["adapter_leakage"]
        metrics = {**entry.metrics, "leakage": leak, "leakage_of": {}, "leakage_rest": leak}
        return replace(entry, increment=own, adapter=None, guard_set=guards, metrics=metrics)

    return bank.with_entries(linear(entry, entry.adapter) for entry in bank.values() if entry.adapter is not None)


def concepts_of(pipe: Any, kind: Kind, names: Sequence[str]) -> list[Concept]:
    """Describe names by the prompts that the trainer takes, for erasers that take nothing but prompts."""
    encoded = Encoded(pipe)
    return [described(Concept(name, kind=KIND_OF[kind]), pipe, encoded, names).concept for name in names]


def preserved_prompts(pipe: Any, names: Sequence[str]) -> list[str]:
    """List regular prompts that have none of these names in them."""
    prompts, _ = regular_prompts(lexicon_of(pipe), _PRESERVED)
    return [prompt for prompt in prompts if not mentions(prompt, names)]
