"""Distances between pictures in the features of the built-in judge: in the form of LPIPS, and Fréchet's.

The networks that LPIPS and FID are named after know nothing of 64 x 64 emoji, so these figures compare with others of
this package and not with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from sepme_diffusers import pocket


@torch.no_grad()
def layers(images: Tensor) -> list[Tensor]:
    """The outputs of the judge's stem and of its stages, each (n, channels, h, w).

    Args:
        images: (n, 3, 64, 64) in [0, 1].
    """
    judge = pocket.load_judge()
    outputs = [judge.stem(images * 2 - 1)]
    for stage in judge.stages:
        outputs.append(stage(outputs[-1]))
    return outputs


def layer_distance(features: Tensor, others: Tensor) -> Tensor:
    """The mean over positions of ‖f/‖f‖ − g/‖g‖‖², for each of n pairs, (n,).

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
    """LPIPS's form with the judge's features and uniform weights: the mean over five layers and over the pictures.

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


@torch.no_grad()
def pooled_features(pictures: Sequence[Image.Image]) -> Tensor:
    """What the judge's heads read, texture and shape side by side, (n, 448)."""
    return torch.cat(pocket.load_judge().pooled(pocket.as_tensor(pictures)), dim=1)


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """The Fréchet distance of two sets of features (n, d) and (m, d), as torchmetrics computes it for FID.

    ‖μ − μ'‖² + tr(Σ + Σ' − 2 (Σ Σ')^½). With fewer pictures than dimensions it is biased upwards: compare only figures
    of equal n.

    Raises:
        ImportError: If torchmetrics is missing.
        ValueError: If a set has fewer than two rows.

    Source: arXiv 1706.08500.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # of the extra "eval"

    if min(len(features), len(others)) < 2:
        raise ValueError(f"a covariance needs two pictures or more, not {len(features)} and {len(others)}")
    metric = FrechetInceptionDistance(_AsGiven(features.shape[1]))
    metric.update(features.double(), real=True)
    metric.update(others.double(), real=False)
    return max(float(metric.compute()), 0.0)


class _AsGiven(nn.Module):
    """A feature network for features that were computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features
