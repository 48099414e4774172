"""Captions with slots, "a {subject} and a {subject2}", and words put in them with the right article."""

from __future__ import annotations

import re
from collections.abc import Mapping

# "a {subject2}": an article if there is one, the slot, and which of the caption's words of that slot it is.
SLOT = re.compile(r"(?P<article>\b[Aa] )?\{(?P<numbered>(?P<slot>[a-z]+)\d*)\}")
# A vowel that is heard: an owl and an hourglass, but a unicorn; an X-ray and an HR Giger, whose letters are said.
_VOWEL = re.compile(
    r"(?!e[uw]|one\b|once\b|u(?:ni[^mn]|k|ra|se|su|to))[aeiou]|hour|hon(?:est|o)|heir"
    r"|(?-i:[FHLMNRSX](?:[-.]|[B-DF-HJ-NP-TV-XZ]+\b))",
    re.IGNORECASE,
)


def slots_of(caption: str) -> dict[str, str]:
    """Return the slots of a caption, in order, each with the list of words that it takes from.

    Example:
        >>> slots_of("a {subject} and a {subject2} {place}")
        {'subject': 'subject', 'subject2': 'subject', 'place': 'place'}
    """
    return {match["numbered"]: match["slot"] for match in SLOT.finditer(caption)}


def filled(caption: str, words: Mapping[str, str]) -> str:
    """Put words in a caption's slots; the "a" before a slot becomes "an" where the word asks for it.

    Args:
        caption: The caption.
        words: {slot: word}.

    Example:
        >>> filled("a {subject} and a {subject2}", {"subject": "owl", "subject2": "unicorn"})
        'an owl and a unicorn'
    """

    def fill(match: re.Match[str]) -> str:
        word, article = words[match["numbered"]], match["article"] or ""
        return (article.replace(" ", "n ") if _VOWEL.match(word) else article) + word

    return SLOT.sub(fill, caption)
