"""Which concepts the prompts of a call spell: their gates open, whatever their increments read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.runtime.erased_sets import Key
from sepme_diffusers.text.spelling import spells

Spelled = Sequence[frozenset[Key]]
"""For each picture of a call the concepts that its prompt spells."""


def spelled_by(
    texts: Sequence[str], keys: Iterable[Key], banks: Mapping[str, ConceptBank], pictures_per_prompt: int = 1
) -> Spelled:
    """Find the concepts that prompts spell, by their names and aliases.

    Args:
        texts: Of each prompt of a call.
        keys: The concepts that may act.
        banks: {name: bank}.
        pictures_per_prompt: How many pictures are drawn for each.
    """
    outlines = {key: banks[key[0]].entries.outline(key[1]) for key in keys}
    names = {key: outline.spellings for key, outline in outlines.items() if outline.gates}
    # One concept after another: patterns that find names are remembered, but not those of thousands of concepts.
    hits = {key: [spells(text, spellings) for text in texts] for key, spellings in names.items()}
    found = [frozenset(key for key, of_text in hits.items() if of_text[index]) for index in range(len(texts))]
    return [keys_of for keys_of in found for _ in range(pictures_per_prompt)]
