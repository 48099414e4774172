"""Every measure by name. To add one, write it in a file of its own and list it here."""

from __future__ import annotations

from sepme_diffusers.evaluation.measures.accuracy import OBJECT_ACCURACY, STYLE_ACCURACY
from sepme_diffusers.evaluation.measures.change import LARGEST_CHANGE, MEAN_CHANGE
from sepme_diffusers.evaluation.measures.frechet import FRECHET_DISTANCE
from sepme_diffusers.evaluation.measures.measure import Measure
from sepme_diffusers.evaluation.measures.perceptual import PERCEPTUAL_DISTANCE

MEASURES: dict[str, Measure] = {
    measure.name: measure
    for measure in (
        STYLE_ACCURACY,
        OBJECT_ACCURACY,
        PERCEPTUAL_DISTANCE,
        FRECHET_DISTANCE,
        LARGEST_CHANGE,
        MEAN_CHANGE,
    )
}
