"""Reduced-rank ridge regression inside a null space: an increment in closed form. Tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor


def covariance(rows: Tensor) -> Tensor:
    """SᵀS / n of token rows S (n, d): what soft guards are remembered by, (d, d), float64."""
    rows = rows.double()
    return rows.T @ rows / max(len(rows), 1)


def reduced_rank_edit(
    concept: Tensor,
    change: Tensor,
    null: Tensor,
    rank: int,
    soft: Tensor | None = None,
    soft_weight: float = 0.0,
    ridge: float = 1e-5,
    output_metric: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Factors A (r, d) and B (d, r), float64: the operator e <- e + (e Aᵀ) Bᵀ that changes the concept's tokens.

    With X = E Nᵀ it minimises, over all D of rank r in the null space's coordinates,

        ‖(X D − T) Ω^½‖² / n + tr(Dᵀ (λ N S Nᵀ + ε s I) D Ω),    s = ‖X‖² / (n k)

    whose solution is D_r = M^-½ [M^-½ XᵀT Ω^½]_r Ω^-½ with M = XᵀX/n + penalty (Eckart–Young): the rank is cut by
    effect on the concept, not by the basis's own singular values.

    Args:
        concept: E, the concept's token rows, (n, d).
        change: T, the change of each of these rows that is wanted, (n, d): e(anchor) − e(c).
        null: N, orthonormal rows of the guard's null space, (k, d).
        rank: r; fewer where fewer directions have an effect on the concept.
        soft: Mean outer product of the regular prompts' token rows, (d, d), see `covariance`.
        soft_weight: λ, what moving regular prompts costs, relative to the concept's own.
        ridge: ε, what the norm of the increment costs.
        output_metric: Ω = Σ_m W_mᵀ W_m over the edited modules, (d, d). Default: the identity.

    Raises:
        ValueError: If the shapes do not fit, or no change is wanted.

    Source: reduced-rank regression; SepME's null space from arXiv 2402.05947
    """
    if concept.shape != change.shape or concept.shape[1] != null.shape[1]:
        raise ValueError(
            f"concept rows {tuple(concept.shape)}, change {tuple(change.shape)} and null space {tuple(null.shape)} "
            "must agree: (n, d), (n, d), (k, d)"
        )
    n, k = len(concept), len(null)
    inside, change = concept.double() @ null.T, change.double()
    gram = inside.T @ inside / n
    scale = gram.trace() / k
    metric = gram + ridge * scale * torch.eye(k, dtype=torch.float64, device=gram.device)
    if soft is not None:
        metric = metric + soft_weight * null @ soft.double() @ null.T
    root = _inverse_root(metric)
    wanted = root @ (inside.T @ change / n)
    seen = wanted if output_metric is None else wanted @ _root(output_metric.double())
    directions, effects, _ = torch.linalg.svd(seen, full_matrices=False)
    if not effects[0] > 0:
        raise ValueError("the wanted change is zero: the concept's prompts and their anchors are read the same")
    leading = directions[:, :rank][:, effects[:rank] > 1e-9 * effects[0]]
    return leading.T @ root @ null, wanted.T @ leading


def _inverse_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=values.max() * 1e-14).rsqrt()) @ vectors.T


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
