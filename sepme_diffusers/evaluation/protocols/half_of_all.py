"""Half of all objects erased at once, each with its own increment, beside a baseline in the same run."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.baselines.baseline import Baseline, replaced
from sepme_diffusers.evaluation.measures.accuracy import judged
from sepme_diffusers.evaluation.pictures import erased, generate
from sepme_diffusers.evaluation.probes import Probe
from sepme_diffusers.evaluation.protocols.erasures import concepts_of, erase_names, preserved_prompts
from sepme_diffusers.evaluation.report import Bar, Table
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.runtime.changes import largest_change

# Every other object, so that both halves hold animals, food and things.
HALF: tuple[str, ...] = pocket.objects[::2]
REST: tuple[str, ...] = pocket.objects[1::2]
_RESTORED_ONE_BY_ONE = 3
_FEW_STEPS = 5


def harmonic_mean(erased: float, kept: float) -> float:
    """Compute H, the harmonic mean of (1 − erased ACC) and regular ACC, in [0, 1]; both are given in percent."""
    gone, left = 1 - erased / 100, kept / 100
    return 2 * gone * left / (gone + left) if gone + left else 0.0


@dataclass(frozen=True)
class HalfErased:
    """What an edit of half of all objects did: object ACC in percent of the erased half and of the kept one, and H."""

    name: str
    erased: float
    kept: float

    @property
    def h(self) -> float:
        """The harmonic mean of (1 − erased ACC) and regular ACC."""
        return harmonic_mean(self.erased, self.kept)


def half_probes(styles: Sequence[str], templates: Sequence[str], each: int, seed: int) -> tuple[Probe, Probe]:
    """Write prompts for each object of either half `each` times, in styles and templates taken in turn."""
    cases = list(product(templates, styles))

    def probe(objects: Sequence[str], start: int) -> Probe:
        chosen = [
            (cases[(index + turn) % len(cases)], name) for index, name in enumerate(objects) for turn in range(each)
        ]
        prompts = tuple(template.format(style=style, object=name) for (template, style), name in chosen)
        seeds = tuple(range(start, start + len(chosen)))
        return Probe(prompts, tuple(style for (_, style), _ in chosen), tuple(name for _, name in chosen), seeds)

    return probe(HALF, seed), probe(REST, seed + 10_000)


class HalfOfAllRunner:
    """Erases half of all objects at once, with increments of their own and by a baseline, and measures both.

    Args:
        pipe: The built-in model's pipeline.
        seed: Of the pictures.
        each: Pictures of each object, in held-out templates and styles that no edit saw.
        steps: Denoising steps per picture.
    """

    def __init__(self, pipe: Any, seed: int, each: int, steps: int) -> None:
        self.pipe, self.steps, self.seed = pipe, steps, seed
        self.test = half_probes(words.UNBANKED_STYLES, words.HELD_OUT_TEMPLATES, each, seed)
        # What the baseline's settings are chosen on: other templates, styles and seeds.
        self.choice = half_probes(words.BANKED_STYLES, words.PAIR_TEMPLATES, 1, seed + 50_000)

    def bank(self) -> ConceptBank:
        """Make the half's increments, each alone; they guard each other's names as far as there is room."""
        return erase_names(self.pipe, "objects", HALF)

    def original(self) -> HalfErased:
        """Measure with nothing erased."""
        return self._measured("original", self.test)

    def separate(self, bank: ConceptBank, name: str = "separate increments") -> HalfErased:
        """Measure with all of the half's increments active."""
        with erased(self.pipe, bank, HALF):
            return self._measured(name, self.test)

    def baseline(self, baseline: Baseline, on_try: Callable[[str], None]) -> tuple[HalfErased, list[HalfErased]]:
        """Measure a baseline at the settings that have the highest H on the choice prompts.

        Args:
            baseline: Which.
            on_try: Called with the name of each try.

        Returns:
            What it did on the test prompts, and what each of its settings did on the choice prompts.
        """
        concepts, preserved, tries = concepts_of(self.pipe, "objects", HALF), preserved_prompts(self.pipe, HALF), []
        for settings in baseline.choices:
            name = ", ".join((baseline.name, *(f"{setting} {value}" for setting, value in settings.items())))
            on_try(name)
            weights = baseline.edit(self.pipe, concepts, preserved, **settings)
            with replaced(self.pipe.unet, weights):
                tries.append((self._measured(name, self.choice), weights))
        best, weights = max(tries, key=lambda attempt: attempt[0].h)
        with replaced(self.pipe.unet, weights):
            return self._measured(best.name, self.test), [result for result, _ in tries]

    def restored_change(self, bank: ConceptBank, other: Any) -> int:
        """Restore some concepts, one at a time: the largest change against a pipeline that never had it, in 255ths.

        Args:
            bank: The half's.
            other: A second pipeline, with nothing loaded.
        """
        largest = 0
        for name in random.Random(self.seed).sample(HALF, _RESTORED_ONE_BY_ONE):
            rest = [other for other in HALF if other != name]
            prompts = [f"a {name}", name, *(f"a {other}" for other in rest[:3])]
            with erased(self.pipe, bank, HALF):
                self.pipe.restore(name)
                here = generate(self.pipe, prompts, self.seed, _FEW_STEPS)
            with erased(other, bank.subset(rest), rest):
                there = generate(other, prompts, self.seed, _FEW_STEPS)
            largest = max(largest, largest_change(here, there))
        return largest

    def _measured(self, name: str, probes: tuple[Probe, Probe]) -> HalfErased:
        return HalfErased(name, *(self._object_accuracy(probe) for probe in probes))

    def _object_accuracy(self, probe: Probe) -> float:
        return judged(generate(self.pipe, probe.prompts, probe.seeds, self.steps), probe.styles, probe.objects)[1]


def half_bars(separate: HalfErased, baseline: HalfErased, restored: int) -> list[Bar]:
    """Compare with the bars for half of all objects erased at once."""
    what = f"{len(HALF)} of {len(pocket.objects)} objects erased"
    return [
        Bar(f"{what}: H", ">= 0.93", f"{separate.h:.3f}", separate.h >= 0.93),
        Bar(f"{what}: H, ahead of UCE", f"> {baseline.h:.3f}", f"{separate.h:.3f}", separate.h > baseline.h),
        Bar(f"{what}: any one restored, as if never erased, /255", "0", str(restored), restored == 0),
    ]


def half_table(edits: Sequence[HalfErased], tries: Sequence[HalfErased]) -> Table:
    """Tabulate the edits, and what the baseline's settings were chosen from."""
    named = [(edit.name, edit) for edit in edits] + [(f"choosing: {edit.name}", edit) for edit in tries]
    rows = [(name, f"{edit.erased:.1f}", f"{edit.kept:.1f}", f"{edit.h:.3f}") for name, edit in named]
    return Table(
        f"{len(HALF)} objects erased at once, {len(REST)} regular",
        ("edit", "erased object ACC %", "regular object ACC %", "H"),
        tuple(rows),
    )
