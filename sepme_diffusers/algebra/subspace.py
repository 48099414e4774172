"""Null spaces of guard prompts, bases inside them, and leakage. Tensors in, tensors out.

Rows are tokens: G is (n_rows, d). All decisions are made in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_space(guard: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Return orthonormal rows (rank, d), float64, that span the rows of G (n_rows, d).

    A direction counts if its singular value exceeds `tolerance` times the largest.

    Raises:
        ValueError: If G is not a finite matrix.
    """
    guard = _matrix(guard, "guard")
    if guard.shape[0] == 0:
        return guard
    if guard.shape[0] > guard.shape[1]:  # many rows: the same directions and values, from fewer
        guard = torch.linalg.qr(guard, mode="r").R
    _, values, directions = torch.linalg.svd(guard, full_matrices=False)
    return directions[values > tolerance * values[0]]


def null_space(guard: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Return orthonormal rows N (d - rank, d), float64, with G Nᵀ = 0 up to the tolerance.

    An increment whose rows lie in this space leaves e(g) Wᵀ as it was for every guarded token.

    Args:
        guard: G, the token rows that must not change, (n_rows, d).
        tolerance: Share of the largest singular value below which a direction is free.

    Raises:
        ValueError: If G is not a finite matrix, or its rows fill the whole space.

    Source: arXiv 2402.05947 (weight decoupling).

    Example:
        >>> N = null_space(torch.tensor([[1.0, 0.0, 0.0]]))
        >>> N.shape
        torch.Size([2, 3])
    """
    span = row_space(guard, tolerance)
    rank, d = span.shape
    if rank == d:
        raise ValueError(
            f"the guard fills all {d} dimensions of the text embedding: nothing can be erased without changing it; "
            "guard fewer prompts, or move some of them to the soft guards"
        )
    # The complement of an orthonormal set, from a full QR: exact to rounding whatever the guard's conditioning.
    return torch.linalg.qr(span.T, mode="complete").Q[:, rank:].T.contiguous()


def project(factor: Tensor, null: Tensor) -> Tensor:
    """Project the rows of A (r, d) on the null space N (k, d): A NᵀN, float64."""
    return factor.double() @ null.T @ null


def damped(null: Tensor, penalty: Tensor, concept: Tensor) -> Tensor:
    """Return the rows (I + N P Nᵀ / s)^-½ N (k, d), float64: a null basis in which costly directions are short.

    Args:
        null: N, orthonormal rows, (k, d).
        penalty: N P Nᵀ (k, k), what moving other tokens costs.
        concept: E, the concept's token rows, (n, d); s is the largest eigenvalue of N EᵀE Nᵀ / n.
    """
    # A direction v costs vᵀ N P Nᵀ v on the tokens that must move little, and carries at most s of the concept. Its
    # length becomes (1 + cost / s)^-½, 1 where it costs nothing. A training step along it is as long as that: the
    # shorter, the more the cost exceeds what the direction can do to the concept.
    inside = concept.double() @ null.T
    scale = torch.linalg.matrix_norm(inside, 2) ** 2 / len(inside)
    # The inverse root is taken on the eigenvalues of the cost, which rounding may leave a little below zero.
    values, vectors = torch.linalg.eigh(penalty.double() / scale)
    return (vectors * (1 + values.clamp(min=0)).rsqrt()) @ vectors.T @ null


def leakage(guard: Tensor, delta: Tensor, weight: Tensor) -> Tensor:
    """Return ‖e ΔWᵀ‖ / ‖e Wᵀ‖ for each guarded token row e of G, (n_rows,), float64.

    Args:
        guard: G, (n_rows, d).
        delta: ΔW, (d_out, d).
        weight: W, (d_out, d).
    """
    guard, delta, weight = guard.double(), delta.double(), weight.double()
    return (guard @ delta.T).norm(dim=1) / (guard @ weight.T).norm(dim=1)


def _matrix(rows: Tensor, what: str) -> Tensor:
    if rows.ndim != 2 or not torch.isfinite(rows).all():
        raise ValueError(
            f"the {what} must be a finite matrix (rows, d), not shape {tuple(rows.shape)} with NaN or Inf"
        )
    return rows.double()
