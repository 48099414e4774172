"""Every object and style of the built-in model in one bank, any six of them active."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.measures.accuracy import judged
from sepme_diffusers.evaluation.measures.perceptual import perceptual_distance
from sepme_diffusers.evaluation.pictures import PictureCache, erased
from sepme_diffusers.evaluation.probes import Probe, pairs_probe, plain_probe
from sepme_diffusers.evaluation.protocols.erasures import GUARDS, erase_names
from sepme_diffusers.evaluation.report import Bar, Table
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.runtime.changes import largest_change


@dataclass(frozen=True)
class Selection:
    """Six of the bank's concepts that are active together."""

    kind: str
    styles: tuple[str, ...]
    objects: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """All six, which are erased."""
        return (*self.styles, *self.objects)


def selections(seed: int, each: int) -> list[Selection]:
    """Choose six concepts at random, several times: styles, objects, and three of each.

    Args:
        seed: Of the choice.
        each: Selections of each of the three sorts.
    """
    rng = random.Random(seed)
    counts = {"six styles": (6, 0), "six objects": (0, 6), "three of each": (3, 3)}
    return [
        Selection(kind, tuple(rng.sample(pocket.styles, styles)), tuple(rng.sample(pocket.objects, objects)))
        for kind, (styles, objects) in counts.items()
        for _ in range(each)
    ]


@dataclass(frozen=True)
class SixErased:
    """What six active concepts of the whole bank did; accuracies in percent, each a pair: theirs, the original's.

    Args:
        selection: Which six.
        erased: ACC of what is erased.
        beside: ACC of the other kind on the same pictures: an erased style's object, an erased object's style.
        regular: Style and object ACC, averaged, of prompts with neither.
        distance: Mean perceptual distance of the regular pictures.
        guards: Largest change of the blank prompt and the watermark, /255.
    """

    selection: Selection
    erased: tuple[float, float]
    beside: tuple[float, float]
    regular: tuple[float, float]
    distance: float
    guards: int


class AnySixRunner:
    """Makes one bank of all objects and styles of the built-in model, and measures it with six active.

    Args:
        pipe: The built-in model's pipeline.
        seed: Of the pictures and selections.
        pictures: Of the erased concepts together, and of regular ones as many.
        steps: Denoising steps per picture.
    """

    def __init__(self, pipe: Any, seed: int, pictures: int, steps: int) -> None:
        self.pipe, self.seed, self.pictures = pipe, seed, pictures
        self.cache = PictureCache(pipe, steps)

    def bank(self) -> ConceptBank:
        """Make the bank. Styles guard each other's names exactly; the names of so many objects are damped."""
        styles = erase_names(self.pipe, "styles", pocket.styles)
        return styles.with_entries(erase_names(self.pipe, "objects", pocket.objects).values())

    def probes(self, selection: Selection) -> dict[str, Probe]:
        """Write held-out prompts for the erased styles and objects, for regular pairs and for plain objects."""
        styles = [name for name in pocket.styles if name not in selection.styles]
        objects = [name for name in words.TEST_OBJECTS if name not in selection.objects]
        share, templates = self.pictures // 6, words.HELD_OUT_TEMPLATES
        probes = {
            "style": pairs_probe(
                selection.styles, objects, templates, share * len(selection.styles), self.seed + 1000
            ),
            "object": pairs_probe(
                styles, selection.objects, templates, share * len(selection.objects), self.seed + 2000
            ),
            "regular": pairs_probe(styles, objects, templates, self.pictures, self.seed + 3000),
            "plain": plain_probe(2 * share, self.seed + 4000, objects),
        }
        return {name: probe for name, probe in probes.items() if probe.prompts}

    def measure(self, bank: ConceptBank, selection: Selection) -> SixErased:
        """Draw and measure with six concepts of the bank active."""
        probes = self.probes(selection)
        asked = [*probes.values(), Probe(GUARDS, seeds=tuple(self.seed + 5000 + i for i in range(len(GUARDS))))]
        before = self.cache.draw(asked)
        with erased(self.pipe, bank, selection.names):
            after = self.cache.draw(asked)
        own, beside, regular = zip(*(_accuracies(probes, drawn, selection) for drawn in (after, before)), strict=True)
        kept = [index for index, name in enumerate(probes) if name in ("regular", "plain")]
        changed, unchanged = ([picture for index in kept for picture in drawn[index]] for drawn in (after, before))
        distance = perceptual_distance(changed, unchanged)
        return SixErased(selection, own, beside, regular, distance, largest_change(after[-1], before[-1]))


def _accuracies(
    probes: dict[str, Probe], drawn: Sequence[list[Image.Image]], selection: Selection
) -> tuple[float, float, float]:
    """ACC of what is erased, of what is beside it, and of regular pictures (styles and objects averaged)."""
    accuracies = {
        name: judged(pictures, probe.styles, probe.objects)
        for (name, probe), pictures in zip(probes.items(), drawn, strict=False)
    }
    weights = {"style": len(selection.styles), "object": len(selection.objects)}
    own = sum(weights[kind] * accuracies[kind][kind == "object"] for kind in weights if kind in accuracies)
    beside = sum(weights[kind] * accuracies[kind][kind == "style"] for kind in weights if kind in accuracies)
    regular = [accuracy for name in ("regular", "plain") if name in accuracies for accuracy in accuracies[name]]
    return own / len(selection.names), beside / len(selection.names), sum(regular) / len(regular)


def six_bars(results: Sequence[SixErased]) -> list[Bar]:
    """Compare with the bars for any six active: the worst selection counts."""
    kept = {"beside": 98, "regular": 99}
    worst = max(result.erased[0] for result in results)
    shares = {
        what: min(100 * now / before for now, before in (getattr(result, what) for result in results)) for what in kept
    }
    guards, distance = max(result.guards for result in results), max(result.distance for result in results)
    any_six = "any six of a bank of everything"
    return [
        Bar(f"{any_six}: ACC %, worst selection", "<= 10", f"{worst:.1f}", worst <= 10),
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


def six_table(bank: ConceptBank, results: Sequence[SixErased]) -> Table:
    """Tabulate a row for each selection; the original's accuracies in brackets."""

    def both(pair: tuple[float, float]) -> str:
        return f"{pair[0]:.1f} ({pair[1]:.1f})"

    rows = tuple(
        (
            f"{result.selection.kind}: {', '.join(result.selection.names)}", both(result.erased),
            both(result.beside), both(result.regular), f"{result.distance:.3f}", str(result.guards),
        )
        for result in results
    )  # fmt: skip
    columns = ("active", "erased ACC %", "beside ACC %", "regular ACC %", "regular distance", "guards /255")
    return Table(f"Six active of a bank of {len(bank)}", columns, rows)
