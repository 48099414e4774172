"""How names are spelt: as folders, and when two of them look alike."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable


def slug(name: str) -> str:
    """A name as a folder: lower-case ASCII letters, digits and hyphens."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name).strip("-") or "concept"


# Letters of other scripts that are drawn like a Latin one: the part of Unicode's confusables (UTS 39) in common use.
_TWINS = {
    "a": "аɑα", "c": "сϲ", "d": "ԁ", "e": "еҽ", "g": "ɡ", "h": "һ", "i": "іιı", "j": "јϳ", "k": "кκ", "n": "ո",
    "o": "оοօ", "p": "рρ", "q": "ԛ", "s": "ѕ", "u": "υս", "v": "νѵ", "w": "ԝ", "x": "хχ", "y": "уγ",
    "A": "АΑ", "B": "ВΒ", "C": "СϹ", "E": "ЕΕ", "H": "НΗ", "I": "ІΙӀ", "J": "Ј", "K": "КΚ", "M": "МΜ", "N": "Ν",
    "O": "ОΟՕ", "P": "РΡ", "S": "ЅՏ", "T": "ТΤ", "V": "Ѵ", "X": "ХΧ", "Y": "УΥҮ", "Z": "Ζ",
}  # fmt: skip


_LATIN = str.maketrans({twin: letter for letter, twins in _TWINS.items() for twin in twins})


def look_alikes(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Groups of names that a reader would take for one: other case, width, accents' encoding, spacing or script.

    Example:
        >>> look_alikes(["Monet", "monet ", "Manet"])
        [('Monet', 'monet ')]
    """
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_seen(name), []).append(name)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def _seen(name: str) -> str:
    """What is seen of a name: equal for names that look alike."""
    folded = unicodedata.normalize("NFKC", name).translate(_LATIN).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())
