"""Changes of pixels between two sets of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sepme_diffusers.evaluation.measures.measure import Measure


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


_REFERENCE = "L∞ and L1 distance of 8-bit pictures"
LARGEST_CHANGE = Measure(
    "largest change, /255", _REFERENCE, lambda sample: largest_change(sample.pictures, sample.originals), digits=0
)
MEAN_CHANGE = Measure(
    "mean change, /255", _REFERENCE, lambda sample: mean_change(sample.pictures, sample.originals), digits=1
)
