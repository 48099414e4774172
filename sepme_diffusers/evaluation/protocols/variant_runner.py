"""What variants do to pictures: every measure, on styles that are erased and on others, and on a second UNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusers import UNet2DConditionModel
from PIL import Image

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.measures.measure import Sample
from sepme_diffusers.evaluation.measures.registry import MEASURES
from sepme_diffusers.evaluation.pictures import PictureCache
from sepme_diffusers.evaluation.probes import Probe, probe
from sepme_diffusers.evaluation.protocols.erasures import GUARDS
from sepme_diffusers.evaluation.protocols.variants import STYLES, Edit
from sepme_diffusers.evaluation.report import Bar, Table
from sepme_diffusers.runtime.changes import largest_change

REGULAR = ("stencil", "pixel", "watercolour", "pencil")
# What the table of variants shows: group and measure.
COLUMNS = (
    ("erased", "style ACC %"),
    ("erased", "object ACC %"),
    ("regular", "style ACC %"),
    ("regular", "object ACC %"),
    ("regular", "perceptual distance"),
)


@dataclass(frozen=True)
class Row:
    """What a variant did, and what it cost.

    Args:
        name: The variant.
        figures: {group: {measure: value}} for the groups "erased" and "regular".
        guarded: Largest change of guarded prompts, /255.
        steps: Training steps.
        seconds: To make it.
        kilobytes: On disk.
    """

    name: str
    figures: Mapping[str, Mapping[str, float]]
    guarded: int = 0
    steps: int = 0
    seconds: float = 0.0
    kilobytes: float = 0.0

    def shown(self, group: str, measure: str) -> str:
        """Write a figure as reports show it."""
        return f"{self.figures[group][measure]:.{MEASURES[measure].digits}f}"


class VariantRunner:
    """Draws and measures what variants made, on prompts that none of them saw.

    Args:
        pipe: The built-in model's pipeline, with nothing loaded.
        seed: Of the pictures.
        pictures: Of each style.
        steps: Denoising steps per picture.
    """

    def __init__(self, pipe: Any, seed: int, pictures: int, steps: int) -> None:
        self.pipe, self.steps = pipe, steps
        starts = iter(range(seed, seed + 10**6, 1000))
        self.probes = {
            group: [probe("styles", style, pictures, next(starts)) for style in styles]
            for group, styles in (("erased", STYLES), ("regular", REGULAR))
        }
        guards = (*GUARDS, *REGULAR)
        self.guards = Probe(guards, seeds=tuple(range(seed + 10**6, seed + 10**6 + len(guards))))
        self.original = self._draw()

    def _draw(self) -> dict[str, list[Image.Image]]:
        """Pictures by group, and those of the guarded prompts."""
        cache, groups = PictureCache(self.pipe, self.steps), self.probes | {"guarded": [self.guards]}
        return {
            group: [picture for drawn in cache.draw(probes) for picture in drawn] for group, probes in groups.items()
        }

    def row(self, name: str, edit: Edit | None, seconds: float = 0.0) -> Row:
        """Measure an edit; the original model where there is none.

        Args:
            name: Of the row.
            edit: What the variant made.
            seconds: That it took.
        """
        if edit is None:
            return Row(name, self._figures(self.original))
        with edit.in_force(self.pipe):
            drawn = self._draw()
        guarded = largest_change(drawn["guarded"], self.original["guarded"])
        return Row(name, self._figures(drawn), guarded, edit.steps, seconds, edit.kilobytes)

    def _figures(self, drawn: Mapping[str, list[Image.Image]]) -> dict[str, dict[str, float]]:
        figures = {}
        for group, probes in self.probes.items():
            styles, objects = ([n for p in probes for n in getattr(p, kind)] for kind in ("styles", "objects"))
            sample = Sample(drawn[group], self.original[group], styles, objects)
            figures[group] = {name: measure.of(sample) for name, measure in MEASURES.items()}
        return figures


def table(rows: Sequence[Row]) -> Table:
    """Tabulate the variants: their main figures and what they cost."""
    columns = (*(f"{group}: {measure}" for group, measure in COLUMNS), "guarded: max, /255", "steps", "seconds", "KB")
    cells = tuple(
        (
            row.name, *(row.shown(*column) for column in COLUMNS), str(row.guarded), str(row.steps or ""),
            f"{row.seconds:.1f}" if row.seconds else "", f"{row.kilobytes:.0f}" if row.kilobytes else "",
        )
        for row in rows
    )  # fmt: skip
    return Table(f"Erasing {' and '.join(STYLES)}", ("variant", *columns), cells)


def measures_table(rows: Sequence[Row]) -> Table:
    """Tabulate every measure of every variant, by group."""
    cells = tuple(
        (row.name, group, *(row.shown(group, measure) for measure in MEASURES))
        for row in rows
        for group in row.figures
    )
    return Table("Every measure", ("variant", "group", *MEASURES), cells)


def transfer(pipe: Any, bank: ConceptBank, seed: int, pictures: int, steps: int) -> dict[str, tuple[Row, Row]]:
    """Measure a bank on the UNet that it was made on, and on another: {UNet: rows of the original and of the bank}.

    Args:
        pipe: The built-in model's pipeline, with nothing loaded.
        bank: Text-side increments of `STYLES`.
        seed: Of the pictures.
        pictures: Of each style.
        steps: Denoising steps per picture.
    """
    own, rows = pipe.unet, {}
    try:
        for name in ("base", "variant"):
            if name == "variant":
                pipe.unet = UNet2DConditionModel.from_pretrained(pocket.path("variant"))
            runner = VariantRunner(pipe, seed, pictures, steps)
            rows[name] = runner.row("original", None), runner.row("erased", Edit(bank))
    finally:
        pipe.unet = own
    return rows


def transfer_table(rows: Mapping[str, tuple[Row, Row]]) -> Table:
    """Tabulate accuracies on each UNet, the original's in brackets."""
    columns = COLUMNS[:4]
    cells = tuple(
        (name, *(f"{after.shown(*column)} ({before.shown(*column)})" for column in columns))
        for name, (before, after) in rows.items()
    )
    return Table(
        "One text-side bank on two UNets", ("UNet", *(f"{group}: {measure}" for group, measure in columns)), cells
    )


def transfer_bars(rows: Mapping[str, tuple[Row, Row]]) -> list[Bar]:
    """Compare erased and regular style ACC on the second UNet with the first's: within two points."""
    bars = []
    for group, sign in (("erased", 1), ("regular", -1)):
        first, second = (after.figures[group]["style ACC %"] for _, after in rows.values())
        measured = f"{second:.1f} ({first:.1f})"
        worse = sign * (second - first)
        bars.append(Bar(f"another UNet: {group}: style ACC %", "at most 2 points worse", measured, worse <= 2))
    return bars
