"""Other changes of the weights brought into a null space: as good for the concept, nothing for the guards."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sepme_diffusers.algebra.closed_form import regression_metric

# A change of rank r has r effects; what rounding adds lies below this share of the largest.
_LEAST_EFFECT = 1e-6


def imitation(concept: Tensor, null: Tensor, penalty: Tensor | None = None, ridge: float = 1e-5) -> Tensor:
    """Return K (d, d), float64, with rows in the null space, so that e Kᵀ stands for e at the concept's tokens e.

        K = Eᵀ X M⁻¹ N / n,    X = E Nᵀ,    M = XᵀX / n + N P Nᵀ + ε s I,    s = ‖X‖² / (n k)

    Put behind a change ΔW it gives ΔW K, which does to the concept what ΔW does, and nothing to the guards.

    Args:
        concept: E, the concept's token rows, (n, d).
        null: N, orthonormal rows of the guard's null space, (k, d).
        penalty: N P Nᵀ (k, k), what moving other tokens costs.
        ridge: ε.
    """
    # Of a token e, a change with rows in the null space reads only x = N e. So predict e from x: the Z (k, d) that
    # minimises ‖X Z − E‖² / n + tr(Zᵀ (N P Nᵀ + ε s I) Z) solves the normal equations M Z = Xᵀ E / n.
    null, concept = null.double(), concept.double()
    inside = concept @ null.T
    metric = regression_metric(inside, penalty, ridge)
    predicted = torch.linalg.solve(metric, inside.T @ concept / len(inside))
    # The prediction is Zᵀ x = Zᵀ N e, so K = Zᵀ N.
    return predicted.T @ null


def imitated(
    deltas: Mapping[str, Tensor],
    concept: Tensor,
    null: Tensor,
    penalty: Tensor | None = None,
    ridge: float = 1e-5,
) -> dict[str, Tensor]:
    """Return changes (d_out, d), float64, with rows in the null space, that do to the concept's tokens what ΔW does.

    With X = E Nᵀ and K of `imitation` it is ΔW K, the ridge regression of E ΔWᵀ on X: one K for all modules.

    Args:
        deltas: ΔW_m (d_out, d) by module name.
        concept: E, the concept's token rows, (n, d).
        null: N, orthonormal rows of the guard's null space, (k, d).
        penalty: N P Nᵀ (k, k), what moving other tokens costs.
        ridge: ε, relative to the mean square of X.
    """
    operator = imitation(concept, null, penalty, ridge)
    return {name: delta.double() @ operator for name, delta in deltas.items()}


def separable_factors(
    deltas: Mapping[str, Tensor], concept: Tensor, null: Tensor, rank: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return factors A (r, d) and C_m (d_out, r), float64, of the rank-r part of ΔW NᵀN that the concept feels most.

    Of all D of rank r with rows in the null space it minimises Σ_m ‖E (ΔW_m NᵀN − D_m)ᵀ‖² with one A shared by all
    modules (Eckart–Young on ΔW Nᵀ (N EᵀE Nᵀ)^½, modules stacked), and acts on every other token as ΔW does within
    these directions.

    Args:
        deltas: ΔW_m (d_out, d) by module name.
        concept: E, the concept's token rows, (n, d).
        null: N, orthonormal rows of the guard's null space, (k, d).
        rank: r; fewer where fewer directions have an effect.

    Raises:
        ValueError: If there is no effect at all.
    """
    null = null.double()
    # E Nᵀ = U Σ Vᵀ, and U does not change norms: the concept feels ΔW by F_m = ΔW_m Nᵀ V Σ, with n rows reduced to at
    # most k probes.
    _, sizes, directions = torch.linalg.svd(concept.double() @ null.T, full_matrices=False)
    probes = (directions @ null).T * sizes
    effects = {name: delta.double() @ probes for name, delta in deltas.items()}
    # The best rank-r part of the stacked F is F R Rᵀ, R its leading right singular vectors, from the small FᵀF.
    squares, right = torch.linalg.eigh(sum(effect.T @ effect for effect in effects.values()))
    if not squares[-1] > 0:
        raise ValueError("its change does nothing to the concept's tokens that the guards leave room for")
    values = squares.clamp(min=0).sqrt().flip(0)[:rank]
    kept = values > _LEAST_EFFECT * values[0]
    right = right.flip(1)[:, :rank][:, kept] / values[kept]
    # With C = F R / σ, orthonormal over the stacked modules, that part is C Cᵀ F: so A = Cᵀ ΔW NᵀN.
    c = {name: effect @ right for name, effect in effects.items()}
    a = sum(c[name].T @ delta.double() for name, delta in deltas.items())
    return a @ null.T @ null, c
