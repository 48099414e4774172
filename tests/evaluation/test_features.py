"""Distances in the judge's features: zero for equals, symmetric, and known values of Gaussians."""

import pytest
import torch
from PIL import Image

from sepme_diffusers.evaluation.measures.features import (
    frechet_distance,
    layer_distance,
    layers,
    perceptual_distance,
    pooled_features,
)


def noise(seed: int, n: int = 4) -> list[Image.Image]:
    draw = torch.Generator().manual_seed(seed)
    values = (torch.rand(n, 64, 64, 3, generator=draw) * 255).byte().numpy()
    return [Image.fromarray(picture) for picture in values]


def test_equal_pictures_have_no_distance_and_others_have_one_in_both_directions():
    first, second = noise(0), noise(1)
    assert perceptual_distance(first, first) == 0
    assert perceptual_distance(first, second) == pytest.approx(perceptual_distance(second, first))
    assert 0 < perceptual_distance(first, second) <= 4
    slightly = [Image.blend(a, b, 0.1) for a, b in zip(first, second, strict=True)]
    assert perceptual_distance(first, slightly) < perceptual_distance(first, second) / 3
    with pytest.raises(ValueError, match="4 pictures cannot be compared with 3"):
        perceptual_distance(first, second[:3])


def test_a_layer_sees_directions_and_not_lengths():
    """Orthogonal unit vectors are at distance 2, opposite ones at 4, and scale is nothing."""
    x = torch.zeros(2, 3, 1, 1)
    x[:, 0] = 1
    y = torch.zeros(2, 3, 1, 1)
    y[0, 1], y[1, 0] = 5, -7
    assert layer_distance(x, y).tolist() == [2, 4]
    assert layer_distance(x, 9 * x).tolist() == [0, 0]
    with pytest.raises(ValueError, match="make no pairs"):
        layer_distance(x, y[:1])


def test_the_layers_are_the_stem_and_four_stages():
    assert [part.shape[1:] for part in layers(torch.rand(1, 3, 64, 64))] == [
        (32, 64, 64), (32, 32, 32), (64, 16, 16), (96, 8, 8), (128, 4, 4),
    ]  # fmt: skip


def test_frechet_distance_of_known_gaussians():
    """A shift v costs ‖v‖²; scaling centred features by s costs (1 − s)² tr Σ, with n < d."""
    x = torch.randn(12, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x -= x.mean(0)
    v = torch.arange(20, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(x, x + v) == pytest.approx(float(v.square().sum()), rel=1e-6)
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * float(x.square().sum() / 11), rel=1e-4)
    assert frechet_distance(x, x + v) == pytest.approx(frechet_distance(x + v, x))
    with pytest.raises(ValueError, match="two pictures or more"):
        frechet_distance(x[:1], x)


def test_pooled_features_are_what_the_heads_read():
    assert pooled_features(noise(2)).shape == (4, 2 * 96 + 2 * 128)
