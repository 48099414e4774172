"""Reduced-rank ridge regression inside a null space: an increment in closed form. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sepme_diffusers.algebra.leading import leading_directions

# From so many times fewer directions than there are on, it is faster to search for them than to find all.
_FEW = 12
# So many more directions than are wanted are searched for: the search is faster the less it leaves out.
_MORE = 4


def covariance(rows: Tensor) -> Tensor:
    """Return SᵀS / n of token rows S (n, d), float64, (d, d): what soft guards are remembered by."""
    rows = rows.double()
    return rows.T @ rows / max(len(rows), 1)


def nearest_covariance(matrix: Tensor) -> Tensor:
    """Return the nearest positive semi-definite matrix to a symmetric one (d, d), float64."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp(min=0)) @ vectors.T


@dataclass(frozen=True, eq=False)
class Sums:
    """What the regression takes of a concept's rows, as sums over them: for whoever solves it several times.

    Args:
        squares: XᵀX / n, (k, k), float64.
        moved: XᵀT / n, (k, d), float64.
    """

    squares: Tensor
    moved: Tensor

    @classmethod
    def of(cls, inside: Tensor, change: Tensor) -> Sums:
        """Add up rows X (n, k), float64, and the change T (n, d) that is wanted of them."""
        n = len(inside)
        return cls(inside.T @ inside / n, inside.T @ change.double() / n)


def reduced_rank_edit(
    concept: Tensor,
    change: Tensor,
    null: Tensor,
    rank: int,
    penalty: Tensor | None = None,
    ridge: float = 1e-5,
    output_factor: Tensor | None = None,
    inside: Tensor | None = None,
    sums: Sums | None = None,
) -> tuple[Tensor, Tensor]:
    """Return A (r, d) and B (d, r), float64, of the operator e <- e + (e Aᵀ) Bᵀ that edits the concept's tokens.

    With X = E Nᵀ it minimises, over all D of rank r in the null space's coordinates,

        tr((X D − T) Ω (X D − T)ᵀ) / n + tr(Dᵀ (N P Nᵀ + ε s I) D Ω),    s = ‖X‖² / (n k)

    With M = XᵀX/n + N P Nᵀ + ε s I = R Rᵀ and Ω = Fₒ Fₒᵀ it is D_r = R⁻ᵀ [R⁻¹ XᵀT Fₒ / n]_r Fₒ⁻¹ (Eckart–Young):
    the rank is cut by effect on the concept, not by the basis's own singular values.

    Args:
        concept: E, the concept's token rows, (n, d).
        change: T, the change of each of these rows that is wanted, (n, d): e(anchor) − e(c).
        null: N, orthonormal rows of the guard's null space, (k, d).
        rank: r; fewer where fewer directions have an effect on the concept.
        penalty: N P Nᵀ (k, k), what moving other tokens costs: P is the weighted sum of their mean outer products,
            see `covariance`.
        ridge: ε, what the norm of the increment costs.
        output_factor: Fₒ (d, p), of Ω = Σ_m W_mᵀ W_m over the edited modules. Default: the identity.
        inside: X (n, k), float64, where it is known already.
        sums: Over the rows of X and T, where they are known already: what is left to do does not grow with n.

    Raises:
        ValueError: If the shapes do not fit, or no change is wanted.

    Source: reduced-rank regression; SepME's null space from arXiv 2402.05947
    """
    if concept.shape != change.shape or concept.shape[1] != null.shape[1]:
        raise ValueError(
            f"concept rows {tuple(concept.shape)}, change {tuple(change.shape)} and null space {tuple(null.shape)} "
            "must agree: (n, d), (n, d), (k, d)"
        )
    # An increment with rows in the null space reads of a token e only N e, so the regression is on X = E Nᵀ.
    x = concept.double() @ null.T if inside is None else inside
    root = torch.linalg.cholesky(regression_metric(x, penalty, ridge, None if sums is None else sums.squares))
    # With M = R Rᵀ and Y = Rᵀ D the objective is ‖(Y − R⁻¹ XᵀT / n) Fₒ‖² plus a constant: a plain norm, in which the
    # best Y is Y* = R⁻¹ XᵀT / n. Eckart–Young: the best Y of rank r keeps the leading singular directions U_r of
    # Y* Fₒ, what outputs feel.
    rows, wanted = (x / len(x), change.double()) if sums is None else (None, sums.moved)
    effect = _Effect(root, rows, wanted, None if output_factor is None else output_factor.double())
    directions, effects = effect.leading(rank)
    if not effects[0] > 0:
        raise ValueError("the wanted change is zero: the concept's prompts and their anchors are read the same")
    leading = directions[:, effects > 1e-9 * effects[0]]
    # Back from Y to D = R⁻ᵀ Y: the increment reads R⁻ᵀ U_r, which N takes from coordinates to embeddings, and writes
    # U_rᵀ Y*, in which Fₒ has cancelled.
    a = torch.linalg.solve_triangular(root.T, leading, upper=True)
    return a.T @ null, effect.changes(a)


@dataclass(frozen=True, eq=False)
class _Effect:
    """What the best edit does to outputs, Y* Fₒ = R⁻¹ Xᵀ T Fₒ / n, (k, p): as factors.

    Args:
        root: R (k, k), lower triangular.
        inside: X / n, (n, k); None where it is multiplied out with T.
        change: T (n, d); or XᵀT / n, (k, d).
        output_factor: Fₒ (d, p), or None for the identity.
    """

    root: Tensor
    inside: Tensor | None
    change: Tensor
    output_factor: Tensor | None

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """Return the leading left singular directions U (k, <= rank), and their singular values."""
        if _FEW * rank < min(len(self.change), len(self.root)):
            draw = torch.Generator().manual_seed(0)
            start = torch.randn(self._width, rank + _MORE, generator=draw, dtype=torch.float64, device="cpu")
            return leading_directions(self._times, self._transposed_times, start.to(self.root.device), rank)
        # Many of all directions are wanted. By R⁻¹ Xᵀ = Q F all of it happens in the span Q of the rows, and F T Fₒ is
        # all there is to cut: with fewer rows than directions a smaller matrix.
        rows = torch.eye(len(self.root)).to(self.root) if self.inside is None else self.inside.T
        span, felt = torch.linalg.qr(torch.linalg.solve_triangular(self.root, rows, upper=False))
        directions, effects, _ = torch.linalg.svd(self._felt(felt @ self.change), full_matrices=False)
        return span @ directions[:, :rank], effects[:rank]

    def changes(self, vectors: Tensor) -> Tensor:
        """Tᵀ X u / n for vectors (k, b)."""
        return self.change.T @ (vectors if self.inside is None else self.inside @ vectors)

    @property
    def _width(self) -> int:
        return self.change.shape[1] if self.output_factor is None else self.output_factor.shape[1]

    def _felt(self, change: Tensor) -> Tensor:
        return change if self.output_factor is None else change @ self.output_factor

    def _times(self, vectors: Tensor) -> Tensor:
        """Y* Fₒ v for vectors (p, b)."""
        moved = self.change @ (vectors if self.output_factor is None else self.output_factor @ vectors)
        moved = moved if self.inside is None else self.inside.T @ moved
        return torch.linalg.solve_triangular(self.root, moved, upper=False)

    def _transposed_times(self, vectors: Tensor) -> Tensor:
        """(Y* Fₒ)ᵀ u for vectors (k, b)."""
        moved = self.changes(torch.linalg.solve_triangular(self.root.T, vectors, upper=True))
        return moved if self.output_factor is None else self.output_factor.T @ moved


def with_gain(
    factors: tuple[Tensor, Tensor], concept: Tensor, change: Tensor, gain: float, output_factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the same A, and B scaled so that the concept's rows get this share of the wanted change.

        ⟨(E Aᵀ) Bᵀ, T⟩_Ω = gain ‖T‖²_Ω

    Args:
        factors: A (r, d) and B (d, r) of `reduced_rank_edit`.
        concept: E, (n, d).
        change: T, (n, d).
        gain: The share.
        output_factor: Fₒ (d, p), see `reduced_rank_edit`.

    Raises:
        ValueError: If the factors do not move the rows towards the change at all.
    """
    share = given_share(factors, concept, change, output_factor)
    if not share > 0:
        raise ValueError(f"the increment gives {share:.2g} of the wanted change; no scale makes that {gain:g}")
    return factors[0], factors[1] * (gain / share)


def given_share(
    factors: tuple[Tensor, Tensor], concept: Tensor, change: Tensor, output_factor: Tensor | None = None
) -> float:
    """Return which share of the wanted change an increment gives the concept's rows, ⟨(E Aᵀ) Bᵀ, T⟩_Ω / ‖T‖²_Ω.

    Args:
        factors: A (r, d) and B (d, r) of `reduced_rank_edit`.
        concept: E, (n, d).
        change: T, (n, d).
        output_factor: Fₒ (d, p), see `reduced_rank_edit`.
    """
    (a, b), wanted = factors, change.double()
    # ⟨(E Aᵀ) Bᵀ, T⟩ = ⟨Bᵀ, (E Aᵀ)ᵀ T⟩: r rows instead of n.
    written, met = b.T, (concept.double() @ a.T).T @ wanted
    if output_factor is not None:
        written, met, wanted = (part @ output_factor.double() for part in (written, met, wanted))
    return float((written * met).sum() / wanted.square().sum())


def regression_metric(inside: Tensor, penalty: Tensor | None, ridge: float, squares: Tensor | None = None) -> Tensor:
    """Return M = XᵀX / n + N P Nᵀ + ε s I, (k, k), float64: what an edit costs, in the null space's coordinates.

    Args:
        inside: X = E Nᵀ, the concept's token rows in these coordinates, (n, k), float64.
        penalty: N P Nᵀ (k, k), what moving other tokens costs; or None.
        ridge: ε, what the edit's norm costs, relative to s = ‖X‖² / (n k).
        squares: XᵀX / n, where it is known already.
    """
    n, k = inside.shape
    outside = inside.new_zeros(()) if penalty is None else penalty.double()
    metric = torch.addmm(outside, inside.T, inside, alpha=1 / n) if squares is None else squares + outside
    size = float(inside.square().sum()) / n if squares is None else float(squares.trace())
    metric.diagonal().add_(ridge * size / k)
    return metric


def output_factor(weights: Iterable[Tensor]) -> Tensor:
    """Return Fₒ (d, d), float64, Fₒ Fₒᵀ = Σ_m W_mᵀ W_m over weights W_m (d_out, d): how outputs feel a change."""
    values, vectors = torch.linalg.eigh(sum(weight.double().T @ weight.double() for weight in weights))
    return vectors * values.clamp(min=0).sqrt()
