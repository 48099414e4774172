"""How names are spelt: as folders, and when two of them look alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

import regex
from confusable_homoglyphs.confusables import confusables_data

# Every file system takes a folder's name of this length, with a hash behind it.
_LONGEST_SLUG = 100
# Windows has devices of these names in every folder.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))}

# What is drawn as nothing: Unicode's own list of it, where Python has none.
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")
_BLANK_BRAILLE = "\u2800"


def slug(name: str) -> str:
    """Spell a name as a folder that every system takes: at most 100 lower-case ASCII letters, digits and hyphens.

    Example:
        >>> slug("Van Gogh"), slug("CON")
        ('van-gogh', 'con-concept')
    """
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    folder = re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-")[:_LONGEST_SLUG].strip("-")
    return f"{folder}-concept" if folder in _DEVICES else folder or "concept"


def is_visible(name: str) -> bool:
    """Tell whether there is anything to see of a name."""
    return bool(_without_invisible(unicodedata.normalize("NFKC", name)))


def look_alikes(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Find groups of names that a reader would take for one.

    Two names look alike if they are equal but for case, width, spacing, invisible characters, the encoding of accents,
    and letters that Unicode lists as confusable (UTS 39). A name may be in two groups.

    Example:
        >>> look_alikes(["Monet", "monet ", "Manet"])
        [('Monet', 'monet ')]
    """
    groups: dict[tuple[int, str], list[str]] = {}
    for name in names:
        for key in enumerate(_keys(name)):
            groups.setdefault(key, []).append(name)
    return list(dict.fromkeys(tuple(group) for group in groups.values() if len(group) > 1))


def _keys(name: str) -> tuple[str, str]:
    """Reduce a name to what is seen of it, with the case folded before letters and after.

    Cyrillic КАТЕ looks like KATE in capitals alone, and Ice like ice in small letters.
    """
    text = name if name.isascii() else unicodedata.normalize("NFKC", name)
    return _skeleton(text.casefold()), _skeleton(text).casefold()


def _skeleton(text: str) -> str:
    """Put for every letter of a text the one that stands for all that are drawn like it (UTS 39)."""
    letters = unicodedata.normalize("NFD", _without_invisible(text))
    return unicodedata.normalize("NFD", letters.translate(_prototypes()))


def _without_invisible(text: str) -> str:
    """Strip a text of what is drawn as nothing, and put single spaces between its words."""
    if not text.isascii():  # where all that is drawn as nothing is a space
        text = _INVISIBLE.sub("", text).replace(_BLANK_BRAILLE, " ")
    return " ".join(text.split())


@cache
def _prototypes() -> dict[int, str]:
    """Map each letter to the one that stands for it, as `str.translate` wants it.

    The data lists it alone for the letter, and all its letters for it.
    """
    prototypes = {}
    for letter, twins in confusables_data.items():
        if len(letter) == len(twins) == 1:
            other = twins[0]["c"]
            prototypes[ord(letter)] = other if len(confusables_data[other]) > 1 else min(letter, other)
    return prototypes
