"""Kind: what concepts of one sort have in common, read from a data file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from sepme_diffusers.text.captions import SLOT, slots_of
from sepme_diffusers.text.names import some

NAME = "name"
"""The slot of a concept's name."""
OTHER = "other"
"""The slot of other things of the same sort, one of which may take the concept's place."""

Text = Annotated[str, Field(min_length=1, max_length=400, pattern=r"^\S+( \S+)*$")]
Texts = tuple[Text, ...]


class Template(BaseModel, frozen=True, extra="forbid", strict=True):
    """A prompt in which a concept shows.

    Args:
        prompt: With `{name}` and perhaps further slots.
        without: The same prompt without the concept; it has no slot that the prompt lacks.
    """

    prompt: Text
    without: Annotated[str, Field(max_length=400)]

    @model_validator(mode="after")
    def _refuse_other_slots(self) -> Template:
        slots = slots_of(self.prompt)
        if list(slots).count(NAME) != 1:
            raise ValueError(f"{self.prompt!r} needs the slot {{name}} once")
        if odd := [slot for slot in slots_of(self.without) if slot == NAME or slot not in slots]:
            raise ValueError(f"{self.without!r} has slots that do not belong there: {odd}")
        for text in (self.prompt, self.without):
            if set("{}") & set(SLOT.sub("", text)):
                raise ValueError(f"{text!r} has a brace that is part of no slot; write slots like {{subject}}")
        return self


class KnownName(BaseModel, frozen=True, extra="forbid", strict=True):
    """What the kind knows of one concept.

    Args:
        names: Its second names and common misspellings.
        spelled: Those of them, with the concept's own name, that name nothing else: a prompt with one of them is about
            the concept. None for all.
        other: What may take its place, instead of the kind's own list.
    """

    names: Texts
    spelled: Texts | None = None
    other: Texts = ()


def _known(values: Any) -> Any:
    """A bare list is the list of names. Behind this function pydantic expects tuples for JSON's arrays."""
    if isinstance(values, dict):
        return {key: tuple(part) if isinstance(part, list) else part for key, part in values.items()}
    return {"names": tuple(values)} if isinstance(values, list) else values


class Kind(BaseModel, frozen=True, extra="forbid", strict=True):
    """What concepts of one sort have in common: the prompts in which they show, and what is left without them.

    Args:
        kind: Its name.
        version: Raised whenever the prompts change.
        about: One sentence about it.
        becomes: What an erased picture is to look like. "without": like that of the prompt without the concept.
            "other": like that of the same prompt with another thing of the sort, one of the words for `{other}`.
        neighbours: The slot of the lexicon with names of this sort; None if it has none.
        templates: The prompts.
        words: {slot: words for it}.
        aliases: Patterns of further names, with `{name}`.
        known: {name: what is known of the concept}, in any case.

    Raises:
        ValueError: If a slot has no words, a text is there twice, or anything is of another type.
    """

    kind: Annotated[str, Field(pattern=r"^[a-z][a-z-]{0,39}$")]
    version: Annotated[int, Field(ge=1)]
    about: Text
    becomes: Literal["without", "other"]
    neighbours: str | None
    templates: tuple[Template, ...]
    words: Mapping[str, Texts]
    aliases: Texts = ()
    known: Mapping[str, Annotated[KnownName, BeforeValidator(_known)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _refuse_holes(self) -> Kind:
        for where, texts in self._lists():
            if twice := [text for text, count in Counter(map(str.casefold, texts)).items() if count > 1]:
                raise ValueError(f"{where}: given twice: {some(twice)}")
        if missing := sorted({slot for slot in self._slots() if slot != NAME and not self._has_words(slot)}):
            raise ValueError(f"words: there are none for the slots {missing}; there are {sorted(self.words)}")
        if self.becomes == "other" and not self._has_words(OTHER):
            raise ValueError("becomes \"other\" needs words for the slot 'other'")
        if odd := [pattern for pattern in self.aliases if list(slots_of(pattern)) != [NAME]]:
            raise ValueError(f"aliases: patterns need {{name}} and no other slot, unlike {odd}")
        return self

    def _lists(self) -> Iterator[tuple[str, Sequence[str]]]:
        yield "templates", [template.prompt for template in self.templates]
        yield "aliases", self.aliases
        yield "known", list(self.known)
        yield from ((f"words[{slot!r}]", words) for slot, words in self.words.items())
        for name, said in self.known.items():
            yield f"known[{name!r}]", [name, *said.names]

    def _slots(self) -> Iterator[str]:
        for template in self.templates:
            yield from slots_of(template.prompt).values()

    def _each_known_has_others(self, slot: str) -> bool:
        return slot == OTHER and bool(self.known) and all(said.other for said in self.known.values())

    def _has_words(self, slot: str) -> bool:
        return bool(self.words.get(slot)) or self._each_known_has_others(slot)

    @classmethod
    def from_file(cls, path: str | Path) -> Kind:
        """Read a kind from a JSON file.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is no kind, naming the file and the key.
        """
        return read_kind(Path(path).read_bytes(), str(path))

    def about_name(self, name: str) -> KnownName:
        """Return what is known of a concept, by its name or one of its second names; nothing for a new one."""
        folded = name.casefold()
        # What is known by this name, before what has it as a second one: a rifle is a gun, and no gun is a rifle.
        for known, said in sorted(self.known.items(), key=lambda item: item[0].casefold() != folded):
            if folded in {known.casefold(), *(other.casefold() for other in said.names)}:
                names = tuple(other for other in (known, *said.names) if other.casefold() != folded)
                return KnownName(names=names, spelled=said.spelled, other=said.other)
        return KnownName(names=())

    def names_of(self, name: str, aliases: Sequence[str] = ()) -> tuple[str, ...]:
        """Return what a concept is called: its name, the aliases that a user gives, those known, and patterns."""
        known = self.about_name(name).names
        patterned = (pattern.replace("{name}", name) for pattern in self.aliases)
        return tuple({text.casefold(): text for text in (name, *aliases, *known, *patterned)[::-1]}.values())[::-1]


def read_kind(data: bytes, file: str) -> Kind:
    """Read a kind from a file's bytes.

    Raises:
        ValueError: If it is no kind, naming the file and the key.
    """
    try:
        return Kind.model_validate_json(data)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors()[:5])
        raise ValueError(f"{file} is no kind of concepts: {faults}") from error
