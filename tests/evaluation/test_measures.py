"""Measures: accuracies, changes of pixels, and distances in the judge's features with known values."""

import pytest
import torch
from PIL import Image

from sepme_diffusers.evaluation.measures.accuracy import accuracy
from sepme_diffusers.evaluation.measures.frechet import frechet_distance
from sepme_diffusers.evaluation.measures.judge_features import layers, pooled_features
from sepme_diffusers.evaluation.measures.measure import Sample
from sepme_diffusers.evaluation.measures.perceptual import layer_distance, perceptual_distance
from sepme_diffusers.evaluation.measures.registry import MEASURES
from sepme_diffusers.runtime.changes import largest_change, mean_change


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


def test_frechet_distance_is_the_formula_in_all_dimensions():
    """Computed in the few dimensions that the pictures span, it is the distance in all of them."""
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.randn(6, 30, dtype=torch.float64, generator=draw) for _ in range(2))
    roots = torch.linalg.eigvals(torch.cov(x.T) @ torch.cov(y.T)).sqrt().real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + torch.cov(x.T).trace() + torch.cov(y.T).trace() - 2 * roots
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-5)


def test_pooled_features_are_what_the_heads_read():
    assert pooled_features(noise(2)).shape == (4, 2 * 96 + 2 * 128)


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (64, 64), (value, value, value))


def test_accuracy_is_the_share_of_right_answers_in_percent():
    probabilities = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert accuracy(probabilities, ["a", "b", "b", "b"], ["a", "b"]) == 75.0


def test_changes_are_counted_in_255ths_in_both_directions():
    assert largest_change([flat(10), flat(200)], [flat(10), flat(50)]) == 150
    assert largest_change([flat(0)], [flat(255)]) == 255
    assert mean_change([flat(10), flat(200)], [flat(10), flat(50)]) == 75.0
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        largest_change([flat(1)], [])


def test_every_registered_measure_has_a_reference_and_sees_no_change_in_the_originals():
    same = Sample(noise(0), noise(0), ["neon"] * 4, ["cat"] * 4)
    other = Sample(noise(0), noise(1), ["neon"] * 4, ["cat"] * 4)
    for name, measure in MEASURES.items():
        assert measure.name == name
        assert measure.reference
        if "ACC" in name:
            assert 0 <= measure.of(same) == measure.of(other) <= 100
        else:
            assert measure.of(same) == pytest.approx(0, abs=1e-5)
            assert measure.of(other) > 0.01
