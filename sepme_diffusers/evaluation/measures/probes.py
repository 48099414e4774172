"""Prompts that no edit sees, with what their pictures should show; and pictures that are each drawn once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, lcm
from typing import Any, Literal

from PIL import Image

from sepme_diffusers.evaluation.measures.metrics import generate
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.pocket.concepts import TEST_OBJECTS

Kind = Literal["styles", "objects"]

# Wordings that the model understands although neither its captions nor any edit has them.
PARAPHRASES: tuple[str, ...] = (
    "a picture of a {object} in the style of {style}",
    "a {object}, {style} picture",
    "{object} in {style}",
)


@dataclass(frozen=True)
class Probe:
    """Prompts that are drawn at every moment: what they should show, and the seed of each."""

    prompts: tuple[str, ...]
    styles: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def cases(self) -> list[tuple[str, int]]:
        """(prompt, seed) of each picture."""
        return list(zip(self.prompts, self.seeds, strict=True))


def probe(
    kind: Kind, name: str, n: int, seed: int, templates: Sequence[str] = words.HELD_OUT_TEMPLATES, word: str = ""
) -> Probe:
    """n prompts for a style or an object; the first k of them are those for n = k.

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
    others = TEST_OBJECTS if kind == "styles" else tuple(words.STYLES)
    start = 5 * list(own).index(name)  # so that names do not all meet the same few others
    styles, objects, prompts = [], [], []
    for index in range(n):
        other = others[(start + index) % len(others)]
        style, object_ = (name, other) if kind == "styles" else (other, name)
        # Once around both, the templates are shifted by one: no prompt comes twice as long as there are others.
        template = templates[(index + index // lcm(len(others), len(templates))) % len(templates)]
        said = {"styles": (word or style, object_), "objects": (style, word or object_)}[kind]
        prompts.append(template.format(style=said[0], object=said[1]))
        styles.append(style)
        objects.append(object_)
    return Probe(tuple(prompts), tuple(styles), tuple(objects), tuple(range(seed, seed + n)))


def plain_probe(n: int, seed: int, among: Sequence[str] = TEST_OBJECTS) -> Probe:
    """n prompts for objects in no style; by default of objects that no style edit sees."""
    stride = _coprime(len(among), 7)
    objects = tuple(among[(stride * index) % len(among)] for index in range(n))
    return Probe(tuple(f"a {name}" for name in objects), (words.PLAIN,) * n, objects, tuple(range(seed, seed + n)))


def pairs_probe(styles: Sequence[str], objects: Sequence[str], templates: Sequence[str], n: int, seed: int) -> Probe:
    """n prompts for pairs of a style and an object, spread evenly over both and over the templates."""
    pairs = list(product(styles, objects))
    stride = _coprime(len(pairs), round(0.618 * len(pairs)))
    chosen = [pairs[(stride * index) % len(pairs)] for index in range(n)]
    prompts = tuple(templates[i % len(templates)].format(style=s, object=o) for i, (s, o) in enumerate(chosen))
    return Probe(prompts, tuple(s for s, _ in chosen), tuple(o for _, o in chosen), tuple(range(seed, seed + n)))


def _coprime(n: int, start: int) -> int:
    """The first number from `start` on that shares no divisor with n: its multiples visit every remainder."""
    return next(candidate for candidate in range(max(start, 1), start + n + 2) if gcd(candidate, n) == 1)


class Studio:
    """Pictures of a pipeline under any erased set; what was drawn once is remembered.

    Args:
        pipe: The pipeline, with at most one bank loaded whenever it draws.
        steps: Denoising steps a picture.
    """

    def __init__(self, pipe: Any, steps: int = 20) -> None:
        self.pipe, self.steps = pipe, steps
        self._drawn: dict[tuple[frozenset[Increment], str, int], Image.Image] = {}

    def draw(self, probes: Sequence[Probe]) -> list[list[Image.Image]]:
        """The pictures of each probe as the pipeline stands."""
        bank = self.pipe.get_bank()
        active = frozenset(bank[name].increment for name in self.pipe.erased) if bank is not None else frozenset()
        asked = [case for one in probes for case in one.cases]
        missing = [case for case in dict.fromkeys(asked) if (active, *case) not in self._drawn]
        if missing:
            prompts, seeds = zip(*missing, strict=True)
            made = generate(self.pipe, prompts, seeds, self.steps)
            self._drawn |= {(active, *case): picture for case, picture in zip(missing, made, strict=True)}
        return [[self._drawn[(active, *case)] for case in one.cases] for one in probes]
