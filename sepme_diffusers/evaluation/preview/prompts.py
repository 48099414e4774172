"""Which prompts a preview draws for a concept: its own, its second names, its neighbours, and regular ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import Entry
from sepme_diffusers.making.calibration import made_for
from sepme_diffusers.making.kinds.wording import described
from sepme_diffusers.making.regular import lexicon_of, regular_prompts
from sepme_diffusers.making.soft_guards import is_about
from sepme_diffusers.text.concept import BLANK, Concept
from sepme_diffusers.text.encoding import Encoded
from sepme_diffusers.text.spelling import mentions

Sort = Literal["own", "alias", "neighbour", "regular"]

# A kind may know dozens of second names of a concept.
_ALIASES = 8
# Of a large bank the neighbours are looked for among so many names.
_CANDIDATES = 500
# More regular prompts than are asked for, since some may name the concept.
_SPARE = 20


@dataclass(frozen=True)
class Asked:
    """A prompt of a preview.

    Args:
        sort: What it is to the concept.
        prompt: The prompt.
        without: The same prompt without what it names; None where nothing is to be missed in it.
        held_out: Whether the increment was made without it.
    """

    sort: Sort
    prompt: str
    without: str | None = None
    held_out: bool = False


def prompts_of(pipe: Any, bank: ConceptBank, name: str, each: int) -> tuple[Asked, ...]:
    """Choose the prompts of a concept's preview.

    Args:
        pipe: The pipeline that is to draw them.
        bank: The bank.
        name: The concept.
        each: How many prompts of its own, how many neighbours and how many regular prompts.

    Raises:
        ValueError: If the concept's kind has no prompts that the text encoder can read.
    """
    entry = bank[name]
    concept = described(entry.concept, pipe, None).concept
    own, frame = _own(concept, each), _frame(concept)
    held_out = "own_reached" in entry.metrics and len(concept.pairs) > len(made_for(len(concept.pairs)))
    asked = [Asked("own", prompt, without, held_out) for prompt, without in own]
    asked += [Asked("alias", *_renamed(frame, concept.name, alias)) for alias in concept.aliases[:_ALIASES]]
    near = _neighbours(pipe, bank, entry, each)
    asked += [Asked("neighbour", *_renamed(frame, concept.name, other)) for other in near]
    asked += [Asked("regular", prompt) for prompt in _regular(pipe, concept, each)]
    return tuple({one.prompt: one for one in reversed(asked)}.values())[::-1]


def _own(concept: Concept, each: int) -> Sequence[tuple[str, str]]:
    """Choose pairs evenly: of those held out, if there are any, and of those with its own name."""
    made = set(made_for(len(concept.pairs)))
    held_out = [pair for index, pair in enumerate(concept.pairs) if index not in made] or concept.pairs
    named = [pair for pair in held_out if mentions(pair[0], [concept.name])]
    pairs = named if len(named) >= each else held_out
    count = min(each, len(pairs))
    return [pairs[index * len(pairs) // count] for index in range(count)]


def _frame(concept: Concept) -> tuple[str, str]:
    """Find the pair into which other names are put: the first held-out one with the concept's own name."""
    named = [pair for pair in _own(concept, len(concept.pairs)) if _put(pair[0], concept.name, "") != pair[0]]
    return named[0] if named else (concept.name, BLANK)


def _renamed(frame: tuple[str, str], name: str, other: str) -> tuple[str, str]:
    return _put(frame[0], name, other), frame[1]


def _put(prompt: str, name: str, other: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", lambda _: other, prompt, count=1, flags=re.IGNORECASE)


def _neighbours(pipe: Any, bank: ConceptBank, entry: Entry, most: int) -> Sequence[str]:
    """Name what is near to a concept: what was found when it was made, or what of its bank is nearest by embedding."""
    if near := entry.metrics.get("nearest"):
        return list(near)[:most]
    own = (entry.concept.name, *entry.concept.aliases)
    others = [name for name in bank if not mentions(name, own)][:_CANDIDATES]
    if not others:
        return []
    means = Encoded(pipe)([entry.concept.name, *others]).mean(dim=1)
    return [others[index] for index in (means[1:] - means[:1]).norm(dim=1).argsort()[:most].tolist()]


def _regular(pipe: Any, concept: Concept, most: int) -> Sequence[str]:
    """Choose regular prompts that no increment is solved with, and that are not about the concept."""
    held_out = regular_prompts(lexicon_of(pipe), 4 * (most + _SPARE))[1]
    return [prompt for prompt in held_out if not is_about(prompt, concept)][:most]
