"""Lexicon: regular prompts, made of captions with slots and of words to put in them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from sepme_diffusers.text.captions import SLOT, filled, slots_of
from sepme_diffusers.text.names import some

# A caption whose prompts were all there before is tried so often, and all captions in turn for so many rounds.
_TRIES = 10
_ROUNDS = 100
_EVERY = 5


@dataclass(frozen=True)
class Lexicon:
    """Captions with slots, and lists of words for the slots.

    Regular prompts are what an erasure should leave alone. A lexicon makes thousands of them, everywhere the same.

    Args:
        captions: "a {subject} and a {subject2}" takes two different words of the list `subject`. The "a" before a slot
            becomes "an" where the word asks for it; so a word for such a slot has no article of its own.
        words: The list of words for each slot. The name of a slot has only the letters a to z.

    Raises:
        ValueError: If a list is empty, is no list of strings, or has an empty or a repeated text. Or if a caption has
            a stray brace, a slot without words, or more slots of one list than it has words.

    Example:
        >>> Lexicon(("a {animal}",), {"animal": ("owl", "cat")}).prompts(2)
        ('a cat', 'an owl')
    """

    captions: tuple[str, ...]
    words: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if not isinstance(self.words, Mapping):
            raise ValueError(f"words must map each slot to a list of strings, not be {_short(self.words)}")
        words = {slot: _texts(f"words[{slot!r}]", texts) for slot, texts in self.words.items()}
        if odd := [slot for slot in words if not re.fullmatch("[a-z]+", slot)]:
            raise ValueError(f"words: a slot's name has only the letters a to z, unlike {some(odd)}")
        captions = _texts("captions", self.captions)
        for caption in captions:
            _check_slots(caption, words)
        object.__setattr__(self, "captions", captions)
        object.__setattr__(self, "words", words)

    @classmethod
    def everyday(cls) -> Lexicon:
        """Return the lexicon of the package: ordinary things, people, places, and styles of all times."""
        return _everyday()

    @classmethod
    def from_file(cls, path: str | Path) -> Lexicon:
        """Read a lexicon from a JSON file: {"captions": [...], "words": {slot: [...]}}.

        Args:
            path: The file.

        Raises:
            OSError: If it cannot be read.
            ValueError: If it is no JSON, has other keys, or makes no lexicon.
        """
        return _parsed(Path(path).read_bytes(), str(path))

    def names(self, slot: str) -> tuple[str, ...]:
        """Return the words of a slot.

        Args:
            slot: "style", for example.

        Raises:
            ValueError: If there is no such slot.
        """
        if slot not in self.words:
            raise ValueError(f"no slot {slot!r}; there are {sorted(self.words)}")
        return self.words[slot]

    def prompts(self, n: int, seed: int = 0) -> tuple[str, ...]:
        """Make n different prompts; the first k of them are those that k gives.

        All captions are used about equally often, and so are all words of a slot.

        Args:
            n: How many.
            seed: Another seed makes other prompts.

        Raises:
            ValueError: If n is negative, or more than the captions and words make.
        """
        if n < 0:
            raise ValueError(f"n must be 0 or more, not {n}")
        made = tuple(islice(self._stream(seed), n))
        if len(made) < n:
            raise ValueError(f"this lexicon makes about {len(made)} prompts, not {n}; give it more words")
        return made

    def _stream(self, seed: int) -> Iterator[str]:
        """Make one new prompt after another, until hardly any is left to be made."""
        rng = Random(seed)
        captions = _Deck(self.captions, rng)
        decks = {slot: _Deck(texts, rng) for slot, texts in self.words.items()}
        made: set[str] = set()
        in_vain = 0
        while in_vain < _ROUNDS * _TRIES * len(self.captions):
            if in_vain % _TRIES == 0:
                caption = captions.draw()
            chosen = _chosen(caption, decks)
            prompt = filled(caption, {slot: word for words in chosen.values() for slot, word in words.items()})
            if prompt not in made:
                made.add(prompt)
                in_vain = 0
                yield prompt
            else:
                in_vain += 1
                for slot, words in chosen.items():
                    decks[slot].put_back(words.values())


def split(prompts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split prompts into those for solving and, held out, every fifth.

    A prompt is on the same side however many follow it.

    Args:
        prompts: In the order of `Lexicon.prompts`.

    Raises:
        TypeError: If a single string is given.
    """
    if isinstance(prompts, str):
        raise TypeError(f"give a list of prompts: [{prompts!r}], not {prompts!r}")
    solving = tuple(prompt for i, prompt in enumerate(prompts, 1) if i % _EVERY)
    return solving, tuple(prompts[_EVERY - 1 :: _EVERY])


@cache
def _everyday() -> Lexicon:
    file = resources.files("sepme_diffusers.text") / "words" / "everyday.json"
    return _parsed(file.read_bytes(), file.name)


def _parsed(data: bytes, name: str) -> Lexicon:
    try:
        values = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
        keys = sorted(values) if isinstance(values, dict) else _short(values)
        if keys != ["captions", "words"]:
            raise ValueError(f"a lexicon is an object with the keys 'captions' and 'words', not {keys}")
        return Lexicon(**values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object. Of two lists for one slot, JSON would drop the first without a word."""
    if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
        raise ValueError(f"keys given twice: {some(twice)}")
    return dict(pairs)


def _texts(key: str, texts: Any) -> tuple[str, ...]:
    """Check a list of captions or words."""
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} must be a list of strings, not {_short(texts)}")
    if not texts:
        raise ValueError(f"{key} is empty; give at least one string")
    if odd := [text for text in texts if not text or not text.isprintable() or text != " ".join(text.split())]:
        raise ValueError(f"{key} must be printable strings with single spaces between words, unlike {some(odd)}")
    if twice := [text for text, count in Counter(text.casefold() for text in texts).items() if count > 1]:
        raise ValueError(f"{key} must differ in more than case; given twice: {some(twice)}")
    return tuple(texts)


def _check_slots(caption: str, words: Mapping[str, Sequence[str]]) -> None:
    """Refuse a caption that cannot be filled."""
    if set("{}") & set(SLOT.sub("", caption)):
        raise ValueError(f"captions: {caption!r} has a brace that is part of no slot; write slots like {{subject}}")
    slots = Counter(slots_of(caption).values())
    for slot, count in slots.items():
        if slot not in words:
            raise ValueError(f"captions: {caption!r} has the unknown slot {slot!r}; there are {sorted(words)}")
        if count > len(words[slot]):
            raise ValueError(f"captions: {caption!r} needs {count} words of {slot!r}; there are {len(words[slot])}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


class _Deck:
    """Texts in a random order, then all of them in another one, and so on."""

    def __init__(self, texts: Sequence[str], rng: Random) -> None:
        self._texts, self._rng = texts, rng
        self._left: list[str] = []  # the next one last

    def draw(self) -> str:
        """Take the next text. What is left is a whole round at least."""
        while len(self._left) <= len(self._texts):
            self._left = self._shuffled() + self._left
        return self._left.pop()

    def put_back(self, texts: Iterable[str]) -> None:
        """Put texts that were drawn in vain somewhere among those left, so that they are used as often as others."""
        for text in texts:
            self._left.insert(self._below(len(self._left) + 1), text)

    def _shuffled(self) -> list[str]:
        order = list(self._texts)
        for i in range(len(order) - 1, 0, -1):
            j = self._below(i + 1)
            order[i], order[j] = order[j], order[i]
        return order

    def _below(self, end: int) -> int:
        return int(self._rng.random() * end)  # Python promises that random(), alone, is the same in all its versions


def _chosen(caption: str, decks: Mapping[str, _Deck]) -> dict[str, dict[str, str]]:
    """Draw words for a caption: by slot, for each number that it has there, and no word twice."""
    chosen: dict[str, dict[str, str]] = {}
    for slot, kind in slots_of(caption).items():
        words = chosen.setdefault(kind, {})
        words[slot] = _unlike(words.values(), decks[kind])
    return chosen


def _unlike(taken: Collection[str], deck: _Deck) -> str:
    """Draw a word that is not taken."""
    skipped = []
    while (word := deck.draw()) in taken:
        skipped.append(word)
    deck.put_back(skipped)
    return word
