"""Changes of pixels between pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True)
class Change:
    """How far a picture is from another one.

    Args:
        largest: The largest difference of any channel of any pixel, in 255ths.
        mean: The mean absolute difference, in 255ths.
    """

    largest: int
    mean: float

    @classmethod
    def between(cls, picture: Image.Image, original: Image.Image) -> Change:
        """Measure how far a picture is from its original.

        Raises:
            ValueError: If they differ in size.
        """
        return cls(largest_change([picture], [original]), mean_change([picture], [original]))

    @property
    def none(self) -> bool:
        """Whether the two pictures are equal to the bit."""
        return self.largest == 0

    def __str__(self) -> str:
        return "equal" if self.none else f"largest {self.largest}, mean {self.mean:.2f}"


def largest_change(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> int:
    """Find the largest difference of any channel of any pixel between two sets of pictures, in 255ths."""
    pairs = zip(pictures, others, strict=True)
    return max(int(np.abs(_numbers(first) - _numbers(second)).max()) for first, second in pairs)


def mean_change(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Average the absolute difference of pixels between two sets of pictures, in 255ths."""
    pairs = zip(pictures, others, strict=True)
    return float(np.mean([np.abs(_numbers(first) - _numbers(second)).mean() for first, second in pairs]))


def _numbers(picture: Image.Image) -> NDArray[np.int16]:
    return np.asarray(picture, np.int16)
