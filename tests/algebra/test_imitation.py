"""Changes brought into a null space do to the concept what they did, as far as can be."""

import pytest
import torch

from sepme_diffusers.algebra.imitation import imitated, separable_factors
from sepme_diffusers.algebra.subspace import null_space


def test_imitation_solves_the_ridge_regression():
    """No small step away from it, inside the null space, lowers the objective."""
    generator = torch.Generator().manual_seed(2)
    tokens, change = (torch.randn(*shape, generator=generator).double() for shape in ((6, 20), (9, 20)))
    null = null_space(torch.randn(3, 20, generator=generator))
    regular = torch.randn(5, 20, generator=generator).double()
    soft, weight, ridge = regular.T @ regular / 5, 0.7, 1e-2

    def objective(edit):
        scale = (tokens @ null.T).square().sum() / len(tokens) / len(null)
        fit = (tokens @ (edit - change).T).square().sum() / len(tokens)
        return fit + weight * torch.trace(edit @ soft @ edit.T) + ridge * scale * edit.square().sum()

    edit = imitated({"m": change}, tokens, null, weight * null @ soft @ null.T, ridge)["m"]
    torch.testing.assert_close(edit @ null.T @ null, edit)
    for _ in range(5):
        step = 1e-3 * torch.randn(9, len(null), generator=generator).double() @ null
        assert objective(edit + step) > objective(edit)


def test_the_rank_is_cut_by_effect_on_the_concept():
    """No other matrix of that rank, such as the change's own leading directions, does the concept more justice."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(6, 20, generator=generator).double()
    tokens[:, 10:] *= 0.01  # the concept hardly lives there ...
    deltas = {name: torch.randn(9, 20, generator=generator).double() for name in "ab"}
    for delta in deltas.values():
        delta[:, 10:] *= 10  # ... where the change is largest
    null = null_space(torch.randn(3, 20, generator=generator))
    a, c = separable_factors(deltas, tokens, null, 2)
    projected = torch.cat(list(deltas.values())) @ null.T @ null
    assert a.shape == (2, 20)
    torch.testing.assert_close(a @ null.T @ null, a)
    error = (tokens @ (projected - torch.cat([c["a"], c["b"]]) @ a).T).norm()
    best = torch.linalg.svdvals(tokens @ projected.T)[2:].norm()
    assert error == pytest.approx(float(best), rel=1e-6)
    u, s, v = torch.linalg.svd(projected)
    assert error < 0.5 * (tokens @ (projected - (u[:, :2] * s[:2]) @ v[:2]).T).norm()
