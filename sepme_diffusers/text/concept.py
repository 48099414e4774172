"""Concept: what is to be erased, described by its kind or by pairs of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sepme_diffusers.text.names import listed
from sepme_diffusers.text.spelling import is_visible, slug

BLANK = ""
_SLOT = "{concept}"
_LONGEST_NAME = 200


@dataclass(frozen=True)
class Concept:
    """A concept: its name, and what it is: one of a kind, or what pairs of prompts show.

    The prompts of a kind are chosen when an increment is made, for the text encoder that it is made for.

    Args:
        name: What users call it: `pipe.set_erased([name])`. The name alone, as a prompt, is what the other
            increments of a bank are guarded on.
        pairs: Pairs (prompt, the same prompt without the concept). Against the blank prompt everything in the picture
            is unlearnt; so pair "a cat in the style of Van Gogh" with "a cat". Default: those of the kind; without a
            kind, the name against "".
        anchors: For each pair the prompts whose mean embedding the closed form maps the prompt to. Tokens are
            matched by the words that they belong to. Default: the pair's second prompt.
        kind: What sort of thing it is: "style", "object", "person", "content", or the name of another kind.
        aliases: Its second names.
        spelled: Which of all these names mean nothing else: a prompt with one of them opens the concept's gate,
            whatever its increment reads. Default: all.

    Raises:
        ValueError: If the name or an alias is empty, invisible, longer than 200 characters or has control characters,
            an alias is there twice, a prompt is there twice or paired with itself, or anchors and pairs differ in
            number.

    Source: arXiv 2402.05947 (concept representation).

    Example:
        >>> Concept.style("Van Gogh", aliases=["Vincent van Gogh"]).kind
        'style'
        >>> Concept.from_template("Van Gogh", "a cat in the style of {concept}", without="a cat").pairs
        (('a cat in the style of Van Gogh', 'a cat'),)
    """

    name: str
    pairs: tuple[tuple[str, str], ...] = ()
    anchors: tuple[tuple[str, ...], ...] = ()
    kind: str | None = None
    aliases: tuple[str, ...] = ()
    spelled: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_name(self.name, "a concept")
        aliases = tuple(listed(self.aliases))
        for alias in aliases:
            _check_name(alias, f"an alias of {self.name!r}")
        if twice := _given_twice([self.name.casefold(), *(alias.casefold() for alias in aliases)]):
            raise ValueError(f"concept {self.name!r} has names given twice: {twice}")
        object.__setattr__(self, "aliases", aliases)
        if unknown := sorted(set(self.spelled or ()) - {self.name, *aliases}):
            raise ValueError(f"concept {self.name!r} is not called {unknown}; its names are {[self.name, *aliases]}")
        by_name = () if self.kind is not None else ((self.name, BLANK),)
        pairs = tuple((str(prompt), str(without)) for prompt, without in self.pairs) or by_name
        if twice := _given_twice([prompt for prompt, _ in pairs]):
            raise ValueError(f"concept {self.name!r} has prompts given twice: {twice}")
        if same := [prompt for prompt, without in pairs if prompt == without]:
            raise ValueError(f"concept {self.name!r} pairs prompts with themselves: {same}")
        anchors = tuple(tuple(prompts) for prompts in self.anchors) or tuple((without,) for _, without in pairs)
        if len(anchors) != len(pairs) or not all(anchors):
            raise ValueError(
                f"concept {self.name!r} has {len(pairs)} pairs but anchors for {len([a for a in anchors if a])}; "
                "give one non-empty tuple of anchor prompts per pair, or none at all"
            )
        object.__setattr__(self, "pairs", pairs)
        object.__setattr__(self, "anchors", anchors)

    @classmethod
    def style(cls, name: str, aliases: Sequence[str] = ()) -> Concept:
        """Name a style: an artist's manner, a technique, a look."""
        return cls(name, kind="style", aliases=tuple(listed(aliases)))

    @classmethod
    def object(cls, name: str, aliases: Sequence[str] = ()) -> Concept:
        """Name an object: a thing that can be counted, an animal, a plant."""
        return cls(name, kind="object", aliases=tuple(listed(aliases)))

    @classmethod
    def person(cls, name: str, aliases: Sequence[str] = ()) -> Concept:
        """Name a person."""
        return cls(name, kind="person", aliases=tuple(listed(aliases)))

    @classmethod
    def content(cls, name: str, aliases: Sequence[str] = ()) -> Concept:
        """Name what is no single thing. The package knows words for "nudity" and "violence"."""
        return cls(name, kind="content", aliases=tuple(listed(aliases)))

    @classmethod
    def paper(cls, name: str) -> Concept:
        """Give the paper's choice of prompts: the name, against the blank prompt.

        Source: arXiv 2402.05947.
        """
        return cls(name)

    @classmethod
    def from_template(
        cls,
        name: str,
        template: str | Sequence[str],
        without: str | Sequence[str],
        anchor: str | Sequence[str] | None = None,
    ) -> Concept:
        """Make a concept from templates with "{concept}" in them, and for each template the prompt without it.

        Args:
            name: The concept's name.
            template: One or more.
            without: The same prompts without the concept.
            anchor: What the closed form puts in the concept's place in every template: a phrase ("a painting"), a
                hypernym ("animal"), or several whose mean is taken. Default: the prompts without the concept.

        Raises:
            ValueError: If a template lacks "{concept}", or the two differ in number.
        """
        templates, withouts = ([texts] if isinstance(texts, str) else list(texts) for texts in (template, without))
        if missing := [text for text in templates if _SLOT not in text]:
            raise ValueError(f"templates without {_SLOT!r}: {missing}")
        if len(templates) != len(withouts):
            raise ValueError(f"{len(templates)} templates but {len(withouts)} prompts without the concept")
        phrases = () if anchor is None else ([anchor] if isinstance(anchor, str) else list(anchor))
        anchors = tuple(tuple(t.replace(_SLOT, phrase) for phrase in phrases) for t in templates) if phrases else ()
        pairs = tuple((t.replace(_SLOT, name), w) for t, w in zip(templates, withouts, strict=True))
        return cls(name, pairs, anchors)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts that show the concept."""
        return tuple(prompt for prompt, _ in self.pairs)

    @property
    def slug(self) -> str:
        """The name as a folder, see `slug`."""
        return slug(self.name)

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names by which a prompt spells the concept."""
        return (self.name, *self.aliases) if self.spelled is None else self.spelled

    def to_dict(self) -> dict[str, Any]:
        """Give a dict of plain values that `from_dict` reads back, without what follows from the rest."""
        values: dict[str, Any] = {"name": self.name}
        if self.kind is not None:
            values["kind"] = self.kind
        if self.aliases:
            values["aliases"] = list(self.aliases)
        if self.spelled is not None:
            values["spelled"] = list(self.spelled)
        if self.pairs:
            values["pairs"] = [list(pair) for pair in self.pairs]
        if self.anchors != tuple((without,) for _, without in self.pairs):
            values["anchors"] = [list(prompts) for prompts in self.anchors]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Concept:
        """Read the concept that `to_dict` wrote."""
        pairs, anchors = (tuple(map(tuple, values.get(key, ()))) for key in ("pairs", "anchors"))
        spelled = None if values.get("spelled") is None else tuple(values["spelled"])
        return cls(values["name"], pairs, anchors, values.get("kind"), tuple(values.get("aliases", ())), spelled)


def as_concepts(concepts: Iterable[Concept | str], kind: str | None = None) -> list[Concept]:
    """Make concepts of concepts and bare names.

    Args:
        concepts: Both, mixed.
        kind: Of the bare names.

    Raises:
        ValueError: If there are none, two share a name, an alias is another concept's name, or a bare name has no
            kind.
        TypeError: If a string is given where a list of them is meant.
    """
    given = listed(concepts)
    if bare := [concept for concept in given if isinstance(concept, str)] if kind is None else []:
        calls = ", ".join(f"erase([{bare[0]!r}], kind={each!r})" for each in ("style", "object", "person", "content"))
        raise ValueError(
            f"what is {bare[0]!r}? Say its kind: {calls}; or Concept.paper({bare[0]!r}) for the paper's choice, the "
            "name against the blank prompt"
        )
    wanted = [concept if isinstance(concept, Concept) else Concept(concept, kind=kind) for concept in given]
    if not wanted:
        raise ValueError("no concept given")
    if twice := _given_twice([concept.name for concept in wanted]):
        raise ValueError(f"concepts given twice: {twice}")
    names = {concept.name.casefold(): concept.name for concept in wanted}
    for concept in wanted:
        if taken := [alias for alias in concept.aliases if alias.casefold() in names]:
            raise ValueError(f"{taken} cannot be aliases of {concept.name!r}: they name other concepts of this call")
    return wanted


def _check_name(name: Any, what: str) -> None:
    if not isinstance(name, str) or not name.isprintable() or not is_visible(name):
        raise ValueError(f"{what} needs a printable, non-empty name, not {name!r}")
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"{what} has a name of at most {_LONGEST_NAME} characters, not {len(name)}: {name[:40]!r}...")


def _given_twice(texts: Sequence[str]) -> list[str]:
    return sorted(text for text, count in Counter(texts).items() if count > 1)
