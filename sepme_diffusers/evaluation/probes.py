"""Prompts that no edit sees, with what their pictures should show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import gcd, lcm
from typing import Literal

from sepme_diffusers.pocket import vocabulary as words

Kind = Literal["styles", "objects"]

# Wordings that the model understands although neither its captions nor any edit has them.
PARAPHRASES: tuple[str, ...] = (
    "a picture of a {object} in the style of {style}",
    "a {object}, {style} picture",
    "{object} in {style}",
)
# Wordings that no kind has, in which the concept is named: politely, among other things, in the plural, as a label.
WORDINGS: dict[Kind, tuple[str, ...]] = {
    "styles": (
        "please draw a {object} in {style}", "{style}: {object}", "{object} {style}", "the {object}, all {style}",
        "my {style} {object} please", "a big {object} in {style} style", "{style} art of a {object}",
        "two {object}s, {style}", "a {object} but {style}", "{object}, {style}, small",
    ),
    "objects": (
        "{style} picture of {object}", "picture of a {object}, {style}", "{style}, {object}", "{object} in a picture",
        "a {object}, a {style} picture", "style of {style}, a {object}", "{object} and a bus",
        "two {object}s, {style}", "{style} {object} picture please", "a fox and a {object} in {style}",
    ),
}  # fmt: skip
DOUBLED: dict[Kind, tuple[str, ...]] = {
    "styles": ("{style} {style} {object}", "a {style} {object} in {style} style"),
    "objects": ("{object} {object}", "a {style} {object}, a {object}"),
}


@dataclass(frozen=True)
class Probe:
    """Prompts to draw, each with what its picture should show and with a seed.

    Args:
        prompts: One per picture.
        styles: The style that each picture should show.
        objects: The object that each picture should show.
        seeds: The seed of each picture.
    """

    prompts: tuple[str, ...]
    styles: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def cases(self) -> list[tuple[str, int]]:
        """List (prompt, seed) of each picture."""
        return list(zip(self.prompts, self.seeds, strict=True))


def probe(
    kind: Kind, name: str, n: int, seed: int, templates: Sequence[str] = words.HELD_OUT_TEMPLATES, word: str = ""
) -> Probe:
    """Write n prompts for a style or an object; the first k of them are those for n = k.

    A style is shown on objects that no style edit sees, an object in every style in turn.

    Args:
        kind: What the name is of.
        name: The style or object.
        n: Prompts.
        seed: Of the first picture; they count up from it.
        templates: Wordings, taken in turn.
        word: What to call it in the prompts. Default: its name.
    """
    own = {"styles": words.STYLES, "objects": words.OBJECTS}[kind]
    others = words.TEST_OBJECTS if kind == "styles" else tuple(words.STYLES)
    start = 5 * list(own).index(name)  # so that names do not all meet the same few others
    styles, objects, prompts = [], [], []
    for index in range(n):
        other = others[(start + index) % len(others)]
        style, object_ = (name, other) if kind == "styles" else (other, name)
        # After each round through both, the templates shift by one: no prompt comes twice as long as there are others.
        template = templates[(index + index // lcm(len(others), len(templates))) % len(templates)]
        called = {"styles": (word or style, object_), "objects": (style, word or object_)}[kind]
        prompts.append(template.format(style=called[0], object=called[1]))
        styles.append(style)
        objects.append(object_)
    return Probe(tuple(prompts), tuple(styles), tuple(objects), tuple(range(seed, seed + n)))


def joined(probes: Iterable[Probe]) -> Probe:
    """Put probes one behind the other."""
    parts = list(probes)
    return Probe(*(tuple(value for part in parts for value in getattr(part, f.name)) for f in fields(Probe)))


def plain_probe(n: int, seed: int, among: Sequence[str] = words.TEST_OBJECTS) -> Probe:
    """Write n prompts for objects in no style; by default of objects that no style edit sees."""
    stride = _coprime(len(among), 7)
    objects = tuple(among[(stride * index) % len(among)] for index in range(n))
    return Probe(tuple(f"a {name}" for name in objects), (words.PLAIN,) * n, objects, tuple(range(seed, seed + n)))


def pairs_probe(styles: Sequence[str], objects: Sequence[str], templates: Sequence[str], n: int, seed: int) -> Probe:
    """Write n prompts for pairs of a style and an object, spread evenly over both and over the templates."""
    pairs = list(product(styles, objects))
    stride = _coprime(len(pairs), round(0.618 * len(pairs)))
    chosen = [pairs[(stride * index) % len(pairs)] for index in range(n)]
    prompts = tuple(templates[i % len(templates)].format(style=s, object=o) for i, (s, o) in enumerate(chosen))
    return Probe(prompts, tuple(s for s, _ in chosen), tuple(o for _, o in chosen), tuple(range(seed, seed + n)))


def _coprime(n: int, start: int) -> int:
    """Find the first number from `start` on that shares no divisor with n: its multiples visit every remainder."""
    return next(candidate for candidate in range(max(start, 1), start + n + 2) if gcd(candidate, n) == 1)
