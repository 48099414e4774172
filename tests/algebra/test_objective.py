import pytest
import torch

from sepme_diffusers.algebra.objective import MomentumStop, balance, concept_representation, correlation_loss, sparsity


def test_correlation_is_the_mean_product():
    edited, frozen = torch.tensor([[[[1.0, 2.0]]], [[[3.0, 0.0]]]]), torch.tensor([[[[2.0, -1.0]]], [[[1.0, 5.0]]]])
    assert correlation_loss(edited, frozen).item() == pytest.approx(((2 - 2) / 2 + (3 + 0) / 2) / 2)


def test_orthogonal_representations_are_unlearnt():
    frozen = torch.randn(2, 4, 8, 8)
    edited = torch.randn(2, 4, 8, 8)
    edited -= frozen * (edited * frozen).sum((1, 2, 3), keepdim=True) / frozen.pow(2).sum((1, 2, 3), keepdim=True)
    assert abs(correlation_loss(edited, frozen).item()) < 1e-6


def test_representation_is_what_the_concept_adds():
    with_concept, without = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    assert torch.equal(concept_representation(with_concept, without), with_concept - without)


def test_sparsity_is_the_norm_a_layer():
    assert sparsity([torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5]])]).item() == pytest.approx(3.5 / 2)


def test_stop_rule_as_written():
    """L_mom <- a L_mom + (1 - a) L_cor from the first loss; stop at the first step where it is at most tau."""
    losses = [1.0, 0.5, 0.1, -0.4, -0.6, -0.2]
    momentum, expected = losses[0], []
    for loss in losses[1:]:
        momentum = 0.7 * momentum + 0.3 * loss
        expected.append(momentum <= 0.2)
    stop = MomentumStop(momentum=0.7, tolerance=0.2, min_steps=1)
    assert [stop.update(loss) for loss in losses] == [False, *expected]
    assert stop.value == pytest.approx(momentum)
    assert True in expected


def test_never_before_min_steps():
    stop = MomentumStop(momentum=0.0, tolerance=1.0, min_steps=3)
    assert [stop.update(-5.0) for _ in range(4)] == [False, False, True, True]


def test_relative_tolerance_is_a_share_of_the_originals_correlation():
    """A warm start, whose first loss is small already, must not have to fall as far again."""
    stop = MomentumStop(momentum=0.0, tolerance=0.1, min_steps=1, relative=True)
    assert [stop.update(loss, 4e-3) for loss in (4e-3, 5e-4, 4e-4)] == [False, False, True]
    warm = MomentumStop(momentum=0.0, tolerance=0.1, min_steps=1, relative=True)
    assert warm.update(3e-4, scale=4e-3)


def test_balance_makes_every_loss_as_large_as_the_largest():
    sizes = [4.0, 2.0, 0.5]
    assert [size * share for size, share in zip(sizes, balance(sizes), strict=True)] == [4.0, 4.0, 4.0]
    assert balance([0.0]) == [1.0]


def test_of_steps_that_share_a_batch_the_first_loss_counts():
    stop = MomentumStop(momentum=0.5, tolerance=0.3, min_steps=1, steps_per_batch=3)
    values = []
    for loss in (1.0, -9.0, -9.0, 0.0, -9.0, -9.0):
        assert stop.between_batches == (stop.step % 3 == 0)
        assert not stop.update(loss)
        values.append(stop.value)
    assert values == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    assert stop.update(0.0)
