"""Half of all objects erased at once, each its own increment, beside a fused edit in the same run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.baselines.uce import replaced, uce
from sepme_diffusers.evaluation.measures.metrics import erased, generate, judged, largest_change
from sepme_diffusers.evaluation.measures.probes import Kind, Probe
from sepme_diffusers.evaluation.protocols.making import GATED, Eraser
from sepme_diffusers.evaluation.report import Bar, Table
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.pocket.concepts import BANKED_STYLES, object_concept, regular_prompts

# Every other object, so that both halves hold animals, food and things.
HALF: tuple[str, ...] = pocket.objects[::2]
REST: tuple[str, ...] = pocket.objects[1::2]
# What the baseline is given to choose from.
RIDGES, PRESERVES = (0.01, 0.1, 1.0), (0.3, 1.0, 3.0)
_RESTORED_ONE_BY_ONE = 3
_FEW_STEPS = 5


def harmonic_mean(erased: float, kept: float) -> float:
    """H of (1 − erased ACC) and regular ACC, both given in percent, in [0, 1]."""
    gone, left = 1 - erased / 100, kept / 100
    return 2 * gone * left / (gone + left) if gone + left else 0.0


@dataclass(frozen=True)
class Halves:
    """What an edit of half of all objects did: object ACC in percent of each half, and H."""

    name: str
    erased: float
    kept: float

    @property
    def h(self) -> float:
        """The harmonic mean of (1 − erased ACC) and regular ACC."""
        return harmonic_mean(self.erased, self.kept)


def half_probes(styles: Sequence[str], templates: Sequence[str], each: int, seed: int) -> tuple[Probe, Probe]:
    """Each object of either half `each` times, in styles and templates taken in turn."""
    cases = list(product(templates, styles))

    def probe(objects: Sequence[str], start: int) -> Probe:
        chosen = [
            (cases[(index + turn) % len(cases)], name) for index, name in enumerate(objects) for turn in range(each)
        ]
        prompts = tuple(template.format(style=style, object=name) for (template, style), name in chosen)
        seeds = tuple(range(start, start + len(chosen)))
        return Probe(prompts, tuple(style for (_, style), _ in chosen), tuple(name for _, name in chosen), seeds)

    return probe(HALF, seed), probe(REST, seed + 10_000)


class HalfOfAll:
    """Half of all objects erased at once, each its own increment, and the same by a fused edit.

    Args:
        pipe: The built-in model's pipeline.
        seed: Of the pictures.
        each: Pictures of each object, in held-out templates and styles that no edit saw.
        steps: Denoising steps a picture.
    """

    def __init__(self, pipe: Any, seed: int, each: int, steps: int) -> None:
        self.pipe, self.steps, self.seed = pipe, steps, seed
        self.test = half_probes(words.UNBANKED_STYLES, words.HELD_OUT_TEMPLATES, each, seed)
        # What the baseline's settings are chosen on: other templates, styles and seeds.
        self.choice = half_probes(BANKED_STYLES, words.PAIR_TEMPLATES, 1, seed + 50_000)
        self.concepts = [object_concept(name) for name in HALF]
        self.preserved = [prompt for name in REST for prompt in regular_prompts(name)]

    def bank(self, settings: Mapping[Kind, SepMEConfig] = GATED) -> ConceptBank:
        """The half's increments, each made alone; they guard each other's names as far as there is room."""
        return Eraser(self.pipe, pocket.objects, settings).erase("objects", HALF)

    def original(self) -> Halves:
        """What the pictures show with nothing erased."""
        return self._measured("original", self.test)

    def separate(self, bank: ConceptBank, name: str = "separate increments") -> Halves:
        """All of the half's increments active."""
        with erased(self.pipe, bank, HALF):
            return self._measured(name, self.test)

    def fused(self, on_try: Callable[[str], None]) -> tuple[Halves, list[Halves]]:
        """UCE at the settings that have the highest H on the choice prompts: on the test prompts, and every try."""
        tries = []
        for ridge, preserve in product(RIDGES, PRESERVES):
            on_try(f"UCE, ridge {ridge}, preserve {preserve}")
            edited = uce(self.pipe, self.concepts, self.preserved, ridge, preserve)
            with replaced(self.pipe.unet, edited):
                tries.append((self._measured(f"UCE, ridge {ridge}, preserve {preserve}", self.choice), edited))
        best, edited = max(tries, key=lambda made: made[0].h)
        with replaced(self.pipe.unet, edited):
            return self._measured(best.name, self.test), [made for made, _ in tries]

    def restored_change(self, bank: ConceptBank, other: Any) -> int:
        """Each of some concepts restored alone: largest change against a pipeline that never had it, in 255ths.

        Args:
            bank: The half's.
            other: A second pipeline, with nothing loaded.
        """
        largest = 0
        for name in random.Random(self.seed).sample(HALF, _RESTORED_ONE_BY_ONE):
            rest = [one for one in HALF if one != name]
            prompts = [f"a {name}", name, *(f"a {one}" for one in rest[:3])]
            with erased(self.pipe, bank, HALF):
                self.pipe.restore(name)
                here = generate(self.pipe, prompts, self.seed, _FEW_STEPS)
            with erased(other, bank.subset(rest), rest):
                there = generate(other, prompts, self.seed, _FEW_STEPS)
            largest = max(largest, largest_change(here, there))
        return largest

    def _measured(self, name: str, halves: tuple[Probe, Probe]) -> Halves:
        return Halves(name, *(self._object_accuracy(probe) for probe in halves))

    def _object_accuracy(self, probe: Probe) -> float:
        return judged(generate(self.pipe, probe.prompts, probe.seeds, self.steps), probe.styles, probe.objects)[1]


def half_bars(separate: Halves, fused: Halves, restored: int) -> list[Bar]:
    """The bars for half of all objects erased at once."""
    what = f"{len(HALF)} of {len(pocket.objects)} objects erased"
    return [
        Bar(f"{what}: H", ">= 0.93", f"{separate.h:.3f}", separate.h >= 0.93),
        Bar(f"{what}: H, ahead of UCE", f"> {fused.h:.3f}", f"{separate.h:.3f}", separate.h > fused.h),
        Bar(f"{what}: any one restored, as if never erased, /255", "0", str(restored), restored == 0),
    ]


def half_table(edits: Sequence[Halves], tries: Sequence[Halves]) -> Table:
    """The halves by edit, and what UCE's settings were chosen from."""
    rows = [(one.name, f"{one.erased:.1f}", f"{one.kept:.1f}", f"{one.h:.3f}") for one in edits]
    rows += [(f"choosing: {one.name}", f"{one.erased:.1f}", f"{one.kept:.1f}", f"{one.h:.3f}") for one in tries]
    return Table(
        f"{len(HALF)} objects erased at once, {len(REST)} regular",
        ("edit", "erased object ACC %", "regular object ACC %", "H"),
        tuple(rows),
    )
