"""Changes of pixels between two sets of pictures, as measures."""

from __future__ import annotations

from sepme_diffusers.evaluation.measures.measure import Measure
from sepme_diffusers.runtime.changes import largest_change, mean_change

_REFERENCE = "L∞ and L1 distance of 8-bit pictures"
LARGEST_CHANGE = Measure(
    "largest change, /255", _REFERENCE, lambda sample: largest_change(sample.pictures, sample.originals), digits=0
)
MEAN_CHANGE = Measure(
    "mean change, /255", _REFERENCE, lambda sample: mean_change(sample.pictures, sample.originals), digits=1
)
