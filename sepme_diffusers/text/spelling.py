"""How names are spelt: as folders, when two of them look alike, and when a prompt mentions one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache

import regex
from confusable_homoglyphs.confusables import confusables_data

from sepme_diffusers.text.names import listed

# Every file system takes a folder's name of this length, with a hash behind it.
_LONGEST_SLUG = 100
# Windows has devices of these names in every folder.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in range(10))}

# What is drawn as nothing: Unicode's own list of it, where Python has none.
_INVISIBLE = regex.compile(r"\p{Default_Ignorable_Code_Point}")
_BLANK_BRAILLE = "\u2800"

_BETWEEN_WORDS = re.compile(r"[\s_\u2010-\u2015-]+")
_JOINTS = re.compile(r"[ .'\u2019]")
_ACCENTS = re.compile(r"[\u0300-\u036f]")
# The s of "cats" and the es of "dresses"; what "gas", "tennis" and "bus" end in is none.
_PLURAL = re.compile(r"(?:(?<=ss|sh|ch)es|(?<=x)es|(?<=\w\w[^\Wsuia])s)$")

# Letters between which nothing shows where a word ends: Thai and Lao, Burmese, Hangul with its particles (in parts, as
# `_plain` leaves it), Khmer, kana, Han.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1100-\u11ff\u1780-\u17ff"
    r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# Where a name may begin and end: at the edge of a word, or anywhere if its own sign there is no letter of such a word.
_STARTS = rf"(?:(?<![^\W{_UNSPACED}])|(?=[\W{_UNSPACED}]))"
_ENDS = rf"(?:(?![^\W{_UNSPACED}])|(?<=[\W{_UNSPACED}]))"


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
    if name.isascii():
        return bool(name.strip())
    return bool(_without_invisible(unicodedata.normalize("NFKC", name)))


def look_alikes(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Find groups of names that a reader would take for one.

    Two names look alike if they are equal but for case, width, spacing, invisible characters, the encoding of accents,
    and letters that Unicode lists as confusable (UTS 39). A name may be in two groups.

    Example:
        >>> look_alikes(["Monet", "monet ", "Manet"])
        [('Monet', 'monet ')]
    """
    if not (names := list(names)):
        return []
    groups: dict[tuple[int, str], list[str]] = {}
    for name, keys in zip(names, _keys(names), strict=True):
        for key in enumerate(keys):
            groups.setdefault(key, []).append(name)
    return list(dict.fromkeys(tuple(group) for group in groups.values() if len(group) > 1))


def mentions(prompt: str, names: Iterable[str]) -> bool:
    """Tell whether a prompt has one of these names in it, as whole words.

    Case, accents, a plural s, and hyphens or spaces within a name make no difference. In scripts that put no spaces
    between words, such as Chinese and Japanese, and beside letters of these, a name need not be a word of its own.

    Args:
        prompt: The prompt.
        names: The names.

    Raises:
        TypeError: If a single string is given for the names.

    Example:
        >>> mentions("two T-shirts on a chair", ["cat", "t shirt"]), mentions("a caterpillar", ["cat"])
        (True, False)
    """
    return bool(_any_of(tuple(listed(names))).search(_plain(prompt)))


def spells(prompt: str, names: Sequence[str]) -> bool:
    """Tell whether a prompt has one of these names in it, perhaps in letters that look like those of the name.

    Args:
        prompt: The prompt.
        names: The names.

    Example:
        >>> spells("a c\u0430t", ["cat"])  # with a Cyrillic letter
        True
    """
    if mentions(prompt, names):
        return True
    return not prompt.isascii() and mentions(_skeleton(prompt.casefold()), [_skeleton(n.casefold()) for n in names])


def bare(name: str) -> str:
    """Reduce a name to what tells it from others: without case, accents, spaces, hyphens, points and apostrophes.

    Example:
        >>> bare("H. R. Giger") == bare("HR Giger"), bare("Édouard Manet") == bare("Edouard Manet")
        (True, True)
    """
    plain = _plain(name)
    return _JOINTS.sub("", plain) or plain


@lru_cache(maxsize=1024)
def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    """Make a pattern that finds any of these names in a plain text: one name is sought in thousands of prompts."""
    plain = filter(None, (_PLURAL.sub("", _plain(name)) for name in names))
    either = "|".join(" ?".join(map(re.escape, name.split(" "))) for name in plain)
    return re.compile(f"{_STARTS}(?:{either})(?:e?s)?{_ENDS}" if either else r"(?!)")


@lru_cache(maxsize=2**14)
def _plain(text: str) -> str:
    """Reduce a text to small letters without accents, with single spaces between its words.

    The same prompts are searched for one concept after another.
    """
    letters = _ACCENTS.sub("", unicodedata.normalize("NFKD", text.casefold()))
    return _BETWEEN_WORDS.sub(" ", letters).strip()


def _keys(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Reduce names to what is seen of them, with the case folded before letters and after.

    Cyrillic КАТЕ looks like KATE in capitals alone, and Ice like ice in small letters.
    """
    # All names at once, a line each: a bank may have tens of thousands.
    lines = unicodedata.normalize("NFKC", "\n".join(" ".join(name.split()) for name in names))
    folded, plain = _skeleton(lines.casefold()), _skeleton(lines).casefold()
    return zip(folded.split("\n"), plain.split("\n"), strict=True)


def _skeleton(lines: str) -> str:
    """Put for every letter of some lines the one that stands for all that are drawn like it (UTS 39)."""
    visible = "\n".join(map(_without_invisible, lines.split("\n")))
    letters = unicodedata.normalize("NFD", visible)
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
