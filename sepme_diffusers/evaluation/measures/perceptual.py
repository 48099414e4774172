"""A perceptual distance in LPIPS's form, with the features of the built-in judge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.measures.judge_features import layers
from sepme_diffusers.evaluation.measures.measure import Measure


def layer_distance(features: Tensor, others: Tensor) -> Tensor:
    """Average ‖f/‖f‖ − g/‖g‖‖² over the positions, for each of n pairs, (n,).

    Args:
        features: f, (n, channels, h, w); norms are over the channels.
        others: g, same shape.

    Raises:
        ValueError: If the shapes differ.
    """
    if features.shape != others.shape:
        raise ValueError(f"features of shapes {tuple(features.shape)} and {tuple(others.shape)} make no pairs")
    first, second = (normalize(part.double(), dim=1, eps=1e-10) for part in (features, others))
    return (first - second).square().sum(dim=1).mean(dim=(1, 2))


def perceptual_distance(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """Measure LPIPS's form with the judge's features and uniform weights, averaged over five layers and the pictures.

    d = mean over layers l of mean over positions of ‖f_l/‖f_l‖ − g_l/‖g_l‖‖²; 0 for equal pictures, at most 4.

    Args:
        pictures: 64 x 64.
        others: What each is compared with.

    Raises:
        ValueError: If they differ in number.

    Source: arXiv 1801.03924 (equation 1, w = 1).
    """
    if len(pictures) != len(others):
        raise ValueError(f"{len(pictures)} pictures cannot be compared with {len(others)} one by one")
    pairs = zip(layers(pocket.as_tensor(pictures)), layers(pocket.as_tensor(others)), strict=True)
    return float(torch.stack([layer_distance(*pair).mean() for pair in pairs]).mean())


PERCEPTUAL_DISTANCE = Measure(
    "perceptual distance",
    "arXiv 1801.03924 (equation 1, w = 1), with the judge's features",
    lambda sample: perceptual_distance(sample.pictures, sample.originals),
    digits=3,
)
