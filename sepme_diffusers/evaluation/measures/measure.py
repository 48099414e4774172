"""What a measure is: a name, where it comes from, and a number for a sample of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Sample:
    """Pictures of an edited model, one per prompt, with what they are compared with.

    Args:
        pictures: Of the edited model, 64 x 64.
        originals: Of the original model, from the same prompts and seeds.
        styles: The style that each should show.
        objects: The object that each should show.
    """

    pictures: Sequence[Image.Image]
    originals: Sequence[Image.Image]
    styles: Sequence[str] = ()
    objects: Sequence[str] = ()


@dataclass(frozen=True)
class Measure:
    """A number for a sample.

    Args:
        name: What reports call it, with its unit.
        reference: Where its definition is from.
        of: Measures a sample.
        digits: Decimal places in a report.
    """

    name: str
    reference: str
    of: Callable[[Sample], float]
    digits: int = 1
