"""Accuracy: the share of pictures in which the built-in judge sees what they should show."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image
from torch import Tensor, tensor

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.measures.measure import Measure


def accuracy(probabilities: Tensor, truth: Sequence[str], names: Sequence[str]) -> float:
    """Count the rows of (n, n_names) whose most probable name is the true one, in percent."""
    return _percent(_right(probabilities, truth, names))


def judged(pictures: Sequence[Image.Image], styles: Sequence[str], objects: Sequence[str]) -> tuple[float, float]:
    """Measure the style and the object accuracy of pictures of the built-in model, in percent."""
    style, object_ = shown(pictures, styles, objects)
    return _percent(style), _percent(object_)


def shown(pictures: Sequence[Image.Image], styles: Sequence[str], objects: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Tell in which pictures the judge sees the style, and in which the object, (n_pictures,) each."""
    style, object_ = pocket.classify(pictures)
    return _right(style, styles, pocket.style_classes), _right(object_, objects, pocket.objects)


def style_accuracy(pictures: Sequence[Image.Image], styles: Sequence[str]) -> float:
    """Measure the style accuracy alone, in percent, of pictures that show no particular object."""
    return accuracy(pocket.classify(pictures)[0], styles, pocket.style_classes)


def _right(probabilities: Tensor, truth: Sequence[str], names: Sequence[str]) -> Tensor:
    return probabilities.argmax(dim=1) == tensor([names.index(name) for name in truth])


def _percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


_REFERENCE = "arXiv 2402.05947 (ACC), with the built-in judge as the classifier"
STYLE_ACCURACY = Measure(
    "style ACC %", _REFERENCE, lambda sample: judged(sample.pictures, sample.styles, sample.objects)[0]
)
OBJECT_ACCURACY = Measure(
    "object ACC %", _REFERENCE, lambda sample: judged(sample.pictures, sample.styles, sample.objects)[1]
)
