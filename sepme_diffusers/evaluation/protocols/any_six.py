"""Every object and style of the built-in model in one bank, any six of them active."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.measures.features import perceptual_distance
from sepme_diffusers.evaluation.measures.metrics import erased, judged, largest_change
from sepme_diffusers.evaluation.measures.probes import Probe, Studio, pairs_probe, plain_probe
from sepme_diffusers.evaluation.protocols.making import Eraser
from sepme_diffusers.evaluation.report import Bar, Table
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.pocket.concepts import GUARDS, TEST_OBJECTS


@dataclass(frozen=True)
class Draw:
    """Six of the bank's concepts that are active together."""

    kind: str
    styles: tuple[str, ...]
    objects: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What is erased."""
        return (*self.styles, *self.objects)


def draws(seed: int, each: int) -> list[Draw]:
    """Sixes chosen at random: styles, objects, and three of each."""
    rng = random.Random(seed)
    counts = {"six styles": (6, 0), "six objects": (0, 6), "three of each": (3, 3)}
    return [
        Draw(kind, tuple(rng.sample(pocket.styles, styles)), tuple(rng.sample(pocket.objects, objects)))
        for kind, (styles, objects) in counts.items()
        for _ in range(each)
    ]


@dataclass(frozen=True)
class Six:
    """What six active concepts of the bank of everything did; accuracies in percent, the original's second.

    Args:
        draw: Which.
        erased: ACC of what is erased.
        beside: ACC of the other kind on the same pictures: an erased style's object, an erased object's style.
        regular: Style and object ACC, averaged, of prompts with neither.
        distance: Mean perceptual distance of the regular pictures.
        guards: Largest change of the blank prompt and the watermark, /255.
    """

    draw: Draw
    erased: tuple[float, float]
    beside: tuple[float, float]
    regular: tuple[float, float]
    distance: float
    guards: int


class Everything:
    """Every object and style of the built-in model in one bank, six active.

    Args:
        pipe: The built-in model's pipeline.
        seed: Of the pictures and draws.
        pictures: Of the erased concepts together, and of regular ones as many.
        steps: Denoising steps a picture.
    """

    def __init__(self, pipe: Any, seed: int, pictures: int, steps: int) -> None:
        self.pipe, self.seed, self.pictures = pipe, seed, pictures
        self.studio = Studio(pipe, steps)

    def bank(self) -> ConceptBank:
        """All of them. Styles guard each other's names, exactly; of so many objects the names are damped."""
        eraser = Eraser(self.pipe, pocket.objects)
        return eraser.erase("styles", pocket.styles).with_entries(eraser.erase("objects", pocket.objects).values())

    def probes(self, draw: Draw) -> dict[str, Probe]:
        """Held-out prompts for the erased styles, the erased objects, regular pairs and regular plain objects."""
        styles = [name for name in pocket.styles if name not in draw.styles]
        objects = [name for name in TEST_OBJECTS if name not in draw.objects]
        share, templates = self.pictures // 6, words.HELD_OUT_TEMPLATES
        made = {
            "style": pairs_probe(draw.styles, objects, templates, share * len(draw.styles), self.seed + 1000),
            "object": pairs_probe(styles, draw.objects, templates, share * len(draw.objects), self.seed + 2000),
            "regular": pairs_probe(styles, objects, templates, self.pictures, self.seed + 3000),
            "plain": plain_probe(2 * share, self.seed + 4000, objects),
        }
        return {name: one for name, one in made.items() if one.prompts}

    def measure(self, bank: ConceptBank, draw: Draw) -> Six:
        """Draw and measure with six of the bank active."""
        probes = self.probes(draw)
        asked = [*probes.values(), Probe(GUARDS, seeds=tuple(self.seed + 5000 + i for i in range(len(GUARDS))))]
        before = self.studio.draw(asked)
        with erased(self.pipe, bank, draw.names):
            after = self.studio.draw(asked)
        own, beside, regular = zip(*(_accuracies(probes, drawn, draw) for drawn in (after, before)), strict=True)
        kept = [index for index, name in enumerate(probes) if name in ("regular", "plain")]
        changed, unchanged = ([picture for index in kept for picture in drawn[index]] for drawn in (after, before))
        distance = perceptual_distance(changed, unchanged)
        return Six(draw, own, beside, regular, distance, largest_change(after[-1], before[-1]))


def _accuracies(
    probes: dict[str, Probe], drawn: Sequence[list[Image.Image]], draw: Draw
) -> tuple[float, float, float]:
    """ACC of what is erased, of what is beside it, and of regular pictures (styles and objects averaged)."""
    found = {
        name: judged(pictures, one.styles, one.objects)
        for (name, one), pictures in zip(probes.items(), drawn, strict=False)
    }
    weights = {"style": len(draw.styles), "object": len(draw.objects)}
    own = sum(weights[kind] * found[kind][kind == "object"] for kind in weights if kind in found)
    beside = sum(weights[kind] * found[kind][kind == "style"] for kind in weights if kind in found)
    regular = [accuracy for name in ("regular", "plain") if name in found for accuracy in found[name]]
    return own / len(draw.names), beside / len(draw.names), sum(regular) / len(regular)


def six_bars(found: Sequence[Six]) -> list[Bar]:
    """The bars for any six active: the worst draw counts."""
    kept = {"beside": 98, "regular": 99}
    worst = max(one.erased[0] for one in found)
    shares = {what: min(100 * now / before for now, before in (getattr(one, what) for one in found)) for what in kept}
    guards, distance = max(one.guards for one in found), max(one.distance for one in found)
    any_six = "any six of a bank of everything"
    return [
        Bar(f"{any_six}: ACC %, worst draw", "<= 10", f"{worst:.1f}", worst <= 10),
        *(
            Bar(
                f"{any_six}: {what} ACC, of the original's",
                f">= {bar} %",
                f"{shares[what]:.1f} %",
                shares[what] >= bar,
            )
            for what, bar in kept.items()
        ),
        Bar(f"{any_six}: perceptual distance of regular pictures", "<= 0.05", f"{distance:.3f}", distance <= 0.05),
        Bar(f"{any_six}: blank prompt and watermark, /255", "<= 1", str(guards), guards <= 1),
    ]


def six_table(bank: ConceptBank, found: Sequence[Six]) -> Table:
    """A row for each draw; the original's accuracies in brackets."""

    def both(pair: tuple[float, float]) -> str:
        return f"{pair[0]:.1f} ({pair[1]:.1f})"

    rows = tuple(
        (
            f"{one.draw.kind}: {', '.join(one.draw.names)}", both(one.erased), both(one.beside), both(one.regular),
            f"{one.distance:.3f}", str(one.guards),
        )
        for one in found
    )  # fmt: skip
    columns = ("active", "erased ACC %", "beside ACC %", "regular ACC %", "regular distance", "guards /255")
    return Table(f"Six active of a bank of {len(bank)}", columns, rows)
