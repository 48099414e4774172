"""Concept: what is to be erased, described by pairs of prompts."""

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
    """A concept: its name, the prompts that show it, and the same prompts without it.

    Args:
        name: What users call it: `pipe.set_erased([name])`. The name alone, as a prompt, is what the other
            increments of a bank are guarded on.
        pairs: Pairs (prompt, the same prompt without the concept). Against the blank prompt everything in the picture
            is unlearnt; so pair "a cat in the style of Van Gogh" with "a cat". Default: the name against "".
        anchors: For each pair the prompts whose mean embedding the closed form maps the prompt to. Tokens are
            matched by position, so an anchor is best worded like its prompt. Default: the pair's second prompt.

    Raises:
        ValueError: If the name is empty, invisible, longer than 200 characters or has control characters, a prompt is
            there twice or paired with itself, or anchors and pairs differ in number.

    Source: arXiv 2402.05947 (concept representation).

    Example:
        >>> Concept.from_template("Van Gogh", "a cat in the style of {concept}", without="a cat")
        Concept(name='Van Gogh', pairs=(('a cat in the style of Van Gogh', 'a cat'),), anchors=(('a cat',),))
    """

    name: str
    pairs: tuple[tuple[str, str], ...] = ()
    anchors: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or not is_visible(self.name):
            raise ValueError(f"a concept needs a printable, non-empty name, not {self.name!r}")
        if len(self.name) > _LONGEST_NAME:
            raise ValueError(
                f"a concept's name has at most {_LONGEST_NAME} characters, not {len(self.name)}: {self.name[:40]!r}..."
            )
        pairs = tuple((str(prompt), str(without)) for prompt, without in self.pairs) or ((self.name, BLANK),)
        if twice := [prompt for prompt, count in Counter(prompt for prompt, _ in pairs).items() if count > 1]:
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

    def to_dict(self) -> dict[str, Any]:
        """Give a dict of plain values that `from_dict` reads back; anchors only where they are not the pairs' own."""
        values: dict[str, Any] = {"name": self.name, "pairs": [list(pair) for pair in self.pairs]}
        if self.anchors != tuple((without,) for _, without in self.pairs):
            values["anchors"] = [list(prompts) for prompts in self.anchors]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Concept:
        """Read the concept that `to_dict` wrote."""
        anchors = tuple(map(tuple, values.get("anchors", ())))
        return cls(values["name"], tuple(map(tuple, values["pairs"])), anchors)


def as_concepts(concepts: Iterable[Concept | str]) -> list[Concept]:
    """Make concepts of concepts and bare names.

    Raises:
        ValueError: If there are none, or two share a name.
        TypeError: If a string is given where a list of them is meant.
    """
    wanted = [concept if isinstance(concept, Concept) else Concept(concept) for concept in listed(concepts)]
    names = [concept.name for concept in wanted]
    if not wanted:
        raise ValueError("no concept given")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"concepts given twice: {twice}")
    return wanted
