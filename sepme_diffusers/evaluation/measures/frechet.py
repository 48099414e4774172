"""The Fréchet distance that FID is, with the features of the built-in judge."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sepme_diffusers.evaluation.measures.judge_features import pooled_features
from sepme_diffusers.evaluation.measures.measure import Measure, Sample


def frechet_distance(features: Tensor, others: Tensor) -> float:
    """Measure the Fréchet distance of two sets of features (n, d) and (m, d), as torchmetrics computes it for FID.

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
    # The distance does not change in an orthonormal basis of what both sets span: a few pictures need few dimensions.
    basis = torch.linalg.qr(torch.cat([features, others]).double().T).Q
    metric = FrechetInceptionDistance(_GivenFeatures(basis.shape[1]))
    metric.update(features.double() @ basis, real=True)
    metric.update(others.double() @ basis, real=False)
    return max(float(metric.compute()), 0.0)


class _GivenFeatures(nn.Module):
    """A feature network for features that were computed before."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _of(sample: Sample) -> float:
    if len(sample.pictures) < 2:
        return math.nan
    return frechet_distance(pooled_features(sample.pictures), pooled_features(sample.originals))


FRECHET_DISTANCE = Measure("FID", "arXiv 1706.08500, with the judge's features", _of)
