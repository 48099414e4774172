"""What a preview finds: for each concept and prompt, pictures at three moments, and what moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from sepme_diffusers.evaluation.preview.judges import Judge
from sepme_diffusers.evaluation.preview.prompts import Asked, Sort
from sepme_diffusers.runtime.changes import Change

MOMENTS = ("original", "erased", "restored")
# Pixels of the longer side of the pictures that a report shows; those in the folder have their own size.
_SHOWN = 384


@dataclass(frozen=True, eq=False)
class Row:
    """A prompt's pictures.

    Args:
        asked: The prompt.
        pictures: At each of `MOMENTS`, at most 384 pixels wide and high.
        erased: How far the erased picture is from the original.
        restored: How far the restored one is.
        blank: Whether one of them is all black: a safety checker took it, or half precision did not hold it.
        scores: What a judge says of each.
    """

    asked: Asked
    pictures: tuple[Image.Image, ...]
    erased: Change
    restored: Change
    blank: bool
    scores: tuple[float, ...] = ()

    @classmethod
    def of(cls, asked: Asked, pictures: Sequence[Image.Image], judge: Judge | None) -> Row:
        """Compare a prompt's pictures, one for each of `MOMENTS`, and let a judge score them."""
        scores: list[float] = []
        if judge is not None and asked.without is not None:
            scores = judge(pictures, [asked.prompt] * len(pictures), [asked.without] * len(pictures))
        original, erased, restored = pictures
        return cls(
            asked,
            tuple(map(_smaller, pictures)),
            Change.between(erased, original),
            Change.between(restored, original),
            any(picture.getbbox() is None for picture in pictures),
            tuple(scores),
        )

    @property
    def as_wanted(self) -> bool:
        """Whether the erasure moved what it should move, and nothing else."""
        return self.erased.none != (self.asked.sort in ("own", "alias")) and not self.blank


@dataclass(frozen=True, eq=False)
class Sheet:
    """What erasing one concept does."""

    concept: str
    rows: tuple[Row, ...]

    def moved(self, *sorts: Sort) -> tuple[int, int]:
        """Count the prompts of some sorts that erasing moves, and all of them."""
        rows = [row for row in self.rows if row.asked.sort in sorts]
        return sum(not row.erased.none for row in rows), len(rows)

    @property
    def restored(self) -> tuple[int, int]:
        """Count the prompts whose restored picture equals the original, and all of them."""
        return sum(row.restored.none for row in self.rows), len(self.rows)

    @property
    def judged(self) -> tuple[float, float] | None:
        """What a judge says of the concept's own prompts and aliases, original and erased; None without a judge."""
        scores = [row.scores for row in self.rows if row.asked.sort in ("own", "alias") and row.scores]
        told = [each for each in scores if not any(map(math.isnan, each))]
        return (_mean([each[0] for each in told]), _mean([each[1] for each in told])) if told else None


@dataclass(frozen=True, eq=False)
class Preview:
    """What erasing each of some concepts does.

    Args:
        sheets: One per concept.
        left_out: Further concepts of the bank.
        facts: {what: value}: how the pictures were drawn.
        judge: The judge's name; empty for none.
    """

    sheets: tuple[Sheet, ...]
    left_out: tuple[str, ...]
    facts: Mapping[str, str]
    judge: str = ""


def _smaller(picture: Image.Image) -> Image.Image:
    smaller = picture.copy()
    smaller.thumbnail((_SHOWN, _SHOWN), Image.Resampling.LANCZOS)
    return smaller


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)
