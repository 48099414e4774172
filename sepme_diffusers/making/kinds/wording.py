"""The prompts in which a concept shows, for one text encoder: a kind's templates, filled."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from sepme_diffusers.making.calibration import ENOUGH
from sepme_diffusers.making.kinds.kind import NAME, OTHER, Kind, Template
from sepme_diffusers.making.kinds.registry import find_kind
from sepme_diffusers.text.captions import SLOT, filled, slots_of
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.spelling import bare, mentions

# How many prompts a concept is described by; of more than fifty names each is in one at least.
_PROMPTS = 100
# Every fifth of them has a template and words that no other has: they are held out, see `calibration.made_for`.
_EVERY = 5
# A template of which a word is spelled in more pieces than this says little to the text encoder.
_PIECES = 3
_FEWEST = 4
# Between one short prompt and the next that stands beside a concept's own.
_STRIDE = 7

Embed = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Worded:
    """A concept with its prompts.

    Args:
        concept: With pairs and anchors, and with the aliases that are known of it.
        kept: What a bank keeps of it: without prompts that follow from its kind.
        anchor: What takes its place; None where nothing does.
        left_out: {template: why the text encoder cannot read it}.
        cut: Second names that are longer than the text encoder reads; no prompt has them.
    """

    concept: Concept
    kept: Concept
    anchor: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    cut: tuple[str, ...] = ()


def described(
    concept: Concept, pipe: Any, embed: Embed | None, avoid: Collection[str] = (), company: Sequence[str] = ()
) -> Worded:
    """Describe a concept by the prompts that it brings, or by those of its kind.

    Args:
        concept: The concept.
        pipe: The pipeline whose text encoder is to read them.
        embed: See `word_concept`.
        avoid: See there; its own name does not count.
        company: Other short prompts: beside these, few prompts that a concept brings become more.

    Raises:
        ValueError: See there; or if there is no such kind.
    """
    if concept.pairs:
        return Worded(in_company(concept, company), concept)
    kind, others = find_kind(str(concept.kind), pipe), [name for name in avoid if name != concept.name]
    named = replace(concept, kind=kind.kind)
    worded = word_concept(named, kind, getattr(pipe, "tokenizer", None), embed, others)
    # Of a kind in a file nobody else has the prompts.
    return worded if kind.kind == concept.kind else replace(worded, kept=worded.concept)


def in_company(concept: Concept, others: Sequence[str]) -> Concept:
    """Write a concept's few prompts beside others as well, so that it is learnt and calibrated in more than its own.

    Args:
        concept: With pairs; of ten or more it is returned as it is.
        others: What stands beside them, "a neon cat, bus" or "bus, a neon cat", and beside their anchors.
    """
    own = list(zip(concept.pairs, concept.anchors, strict=True))
    if len(own) >= ENOUGH or not others:
        return concept
    found = {prompt: (without, anchors) for (prompt, without), anchors in own}
    for turn in range(2 * ENOUGH - len(own)):
        (prompt, without), anchors = own[turn % len(own)]
        other, in_front = others[_STRIDE * turn % len(others)], (turn // len(own)) % 2 == 0

        def beside(text: str, other: str = other, in_front: bool = in_front) -> str:
            return ", ".join(part for part in ((text, other) if in_front else (other, text)) if part)

        if beside(prompt) != beside(without):
            found.setdefault(beside(prompt), (beside(without), tuple(map(beside, anchors))))
    pairs = tuple((prompt, without) for prompt, (without, _) in found.items())
    return replace(concept, pairs=pairs, anchors=tuple(anchors for _, anchors in found.values()))


def word_concept(
    concept: Concept, kind: Kind, tokenizer: Any, embed: Embed | None = None, avoid: Collection[str] = ()
) -> Worded:
    """Describe a concept by the prompts of its kind, as far as a text encoder can read them.

    Args:
        concept: Its name, kind and aliases.
        kind: The kind.
        tokenizer: Of the text encoder; None takes every template.
        embed: Returns the embeddings of prompts, (n, n_tokens, d): what takes the concept's place is what is nearest
            to it. Default: the first of the kind's words for it.
        avoid: What may not take its place, nor is a second name of it, also with other accents, points or spaces: the
            other concepts that are or may be erased. If no word is left for its place, it becomes what the prompt is
            without it.

    Raises:
        ValueError: If fewer than four of the kind's templates can be read, or no word is left for a slot.
    """
    reader = _Reader(tokenizer)
    others, called = set(map(bare, avoid)), kind.names_of(concept.name, concept.aliases)
    names = tuple(name for name in called if name == concept.name or bare(name) not in others)
    usable, left_out = _usable(kind.templates, names[0], reader)
    if len(usable) < _FEWEST:
        raise ValueError(
            f"of the templates of kind {kind.kind!r} the text encoder reads {len(usable)} for {concept.name!r}, and "
            f"{_FEWEST} are the fewest; left out: {left_out}. Describe the concept with pairs of prompts, or give a "
            "kind of your own (a JSON file like those of the package)"
        )
    words = {
        slot: tuple(word for word in listed if reader.reads(word) and not mentions(word, names))
        for slot, listed in kind.words.items()
    }
    words[OTHER] = kind.about_name(concept.name).other or words.get(OTHER, ())
    anchor = None
    if kind.becomes == "other":
        anchor = _nearest(concept.name, words[OTHER], usable, embed, {*avoid, *names})
    prompts = _filled(usable, names, words, anchor, reader)
    spelled = kind.about_name(concept.name).spelled
    if spelled is not None:
        given = (concept.name, *concept.aliases)
        spelled = tuple(name for name in names if name in given or name in spelled)
    kept = replace(concept, aliases=names[1:], spelled=spelled)
    cut = tuple(name for name in names if not reader.fits(name))
    return Worded(replace(kept, **prompts), kept, anchor, left_out, cut)


@dataclass(frozen=True)
class _Reader:
    """What a tokenizer makes of words."""

    tokenizer: Any

    def reads(self, text: str) -> bool:
        """Tell whether no word of a text is spelled in many pieces."""
        return self.tokenizer is None or not self.spelled_out(text)

    def spelled_out(self, text: str) -> list[str]:
        """Return the words that are spelled in more than three pieces; "thirty-year-old" is three words."""
        words = [word.strip(",.'") for word in SLOT.sub(" ", text).replace("-", " ").split()]
        return [word for word in words if word and len(self.tokenizer.tokenize(word)) > _PIECES]

    def fits(self, text: str) -> bool:
        """Tell whether a prompt is not cut."""
        if self.tokenizer is None:
            return True
        return len(self.tokenizer(text, verbose=False).input_ids) <= self.tokenizer.model_max_length


def _usable(templates: Sequence[Template], name: str, reader: _Reader) -> tuple[list[Template], dict[str, str]]:
    """Choose the templates that the text encoder can read, and say why it cannot read the others."""
    usable, left_out = [], {}
    for template in templates:
        bare = filled(template.prompt, {slot: name if slot == NAME else "x" for slot in slots_of(template.prompt)})
        if not reader.reads(template.prompt):
            left_out[template.prompt] = f"it spells {reader.spelled_out(template.prompt)} letter by letter"
        elif not reader.fits(bare):
            left_out[template.prompt] = "it is too long"
        else:
            usable.append(template)
    return usable, left_out


def _nearest(
    name: str, others: Sequence[str], templates: Sequence[Template], embed: Embed | None, avoid: Collection[str]
) -> str | None:
    """Choose what takes the concept's place: what the text encoder reads most like it. None if nothing is left."""
    others = [other for other in others if not mentions(other, list(avoid))]
    if not others or embed is None:
        return others[0] if others else None
    plain = next((t.prompt for t in templates if list(slots_of(t.prompt)) == [NAME]), "{name}")
    embeddings = embed([filled(plain, {NAME: text}) for text in (name, *others)]).flatten(1)
    distances = (embeddings[1:] - embeddings[:1]).norm(dim=1)
    return others[int(distances.argmin())]


def _filled(
    templates: Sequence[Template],
    names: Sequence[str],
    words: Mapping[str, Sequence[str]],
    anchor: str | None,
    reader: _Reader,
) -> dict[str, Any]:
    """Fill templates with names and words: pairs of prompts, and what each is to become."""
    pairs: dict[str, str] = {}
    anchors: list[tuple[str]] = []
    sides = _sides(templates), {slot: _sides(listed) for slot, listed in words.items()}
    count = max(_PROMPTS, 2 * len(names))
    for turn in range(4 * count):
        # Behind every four prompts that an increment is made for comes one that is held out.
        side = int(len(pairs) % _EVERY == _EVERY - 1)
        chosen = sides[0][side]
        template = chosen[turn % len(chosen)]
        # Every second prompt has the concept's own name.
        name = names[0] if turn % 2 == 0 or len(names) == 1 else names[1 + (turn // 2) % (len(names) - 1)]
        values = _words(template, {slot: both[side] for slot, both in sides[1].items()}, turn, anchor)
        prompt = filled(template.prompt, {**values, NAME: name})
        without = filled(template.without, values)
        if prompt in pairs or prompt == without or not reader.fits(prompt):
            continue
        pairs[prompt] = without
        anchors.append((without if anchor is None else filled(template.prompt, {**values, NAME: anchor}),))
        if len(pairs) == count:
            break
    return {"pairs": tuple(pairs.items()), "anchors": tuple(anchors)}


def _sides(texts: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Split texts in those for prompts that an increment is made for, and every fifth, for those held out."""
    held_out = texts[_EVERY - 1 :: _EVERY]
    if not held_out or len(texts) < 2 * _EVERY:
        return texts, texts
    return [text for index, text in enumerate(texts) if index % _EVERY != _EVERY - 1], held_out


def _words(template: Template, words: Mapping[str, Sequence[str]], turn: int, anchor: str | None) -> dict[str, str]:
    """Choose words for a template's slots, another one for each slot and at each turn."""
    values: dict[str, str] = {}
    for place, (slot, kind) in enumerate(slots_of(template.prompt).items()):
        if slot == NAME:
            continue
        free = [word for word in words[kind] if word != anchor and word not in values.values()]
        if not free:
            raise ValueError(
                f"too few words for {{{slot}}} in {template.prompt!r}: the text encoder reads {words[kind]}"
            )
        values[slot] = free[(turn + turn // len(free) + 7 * place) % len(free)]
    return values
