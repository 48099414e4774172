import pytest
import torch

from sepme_diffusers.algebra.subspace import leakage, null_space, project, row_space


def guard(n=40, d=96, rank=25, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, rank, generator=g) @ torch.randn(rank, d, generator=g)


def test_null_space_is_orthonormal_and_blind_to_the_guard():
    g = guard()
    null = null_space(g)
    assert null.shape == (96 - 25, 96)
    assert null.dtype == torch.float64
    torch.testing.assert_close(null @ null.T, torch.eye(71, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (g.double() @ null.T).abs().max() < 1e-5 * g.abs().max()


def test_null_and_row_space_fill_the_whole_space():
    g = guard()
    span = torch.cat([row_space(g), null_space(g)])
    torch.testing.assert_close(span @ span.T, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-10)


def test_tolerance_decides_what_counts_as_a_direction():
    g = torch.diag(torch.tensor([1.0, 1e-3, 1e-8, 0.0]))
    assert [len(null_space(g, tolerance)) for tolerance in (1e-2, 1e-6, 1e-10)] == [3, 2, 1]


def test_badly_conditioned_guards_stay_exact():
    """Token embeddings are nearly parallel; the null space must not soften because of it."""
    g = torch.randn(1, 64, dtype=torch.float64) + 1e-4 * torch.randn(12, 64, dtype=torch.float64)
    null = null_space(g, 1e-9)
    assert len(null) == 52
    assert (g @ null.T).abs().max() < 1e-12


def test_full_guard_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match=r"fills all 8 dimensions.*soft guards"):
        null_space(torch.randn(20, 8))


def test_no_guard_leaves_everything_free():
    assert null_space(torch.zeros(0, 5)).shape == (5, 5)


@pytest.mark.parametrize("bad", [torch.full((2, 3), float("nan")), torch.ones(3)])
def test_bad_guard_is_refused(bad):
    with pytest.raises(ValueError, match="finite matrix"):
        null_space(bad)


def test_projection_is_idempotent_and_kills_leakage():
    torch.manual_seed(0)
    null, factor, weight = null_space(guard()), torch.randn(3, 96), torch.randn(7, 96)
    once = project(factor, null)
    torch.testing.assert_close(project(once, null), once)
    coefficients = torch.randn(7, 3).double()
    assert leakage(guard(), coefficients @ factor.double(), weight).max() > 0.1
    assert leakage(guard(), coefficients @ once, weight).max() < 1e-6
