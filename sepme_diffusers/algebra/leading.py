"""The leading singular directions of a matrix that is known by its products alone. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Of the largest eigenvalue of G Gᵀ: what is left of its equation where a direction counts as found.
_FOUND = 1e-13
# Of the largest singular value: what rounding leaves of a block that has nothing new.
_ROUNDING = 1e-14


def leading_directions(
    times: Callable[[Tensor], Tensor], transposed_times: Callable[[Tensor], Tensor], start: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """Return the leading left singular vectors U (k, <= rank) of a matrix G (k, p) and their singular values.

    Block Lanczos on G Gᵀ, orthogonalised in full: some ten products with few vectors, where a whole decomposition
    costs as many as the matrix has columns. Singular values below 1e-7 of the largest are not told from zero.

    Args:
        times: Gives G v for vectors v (p, b).
        transposed_times: Gives Gᵀ u for vectors u (k, b).
        start: Vectors to start from, (p, b), float64, b > rank; the more, the fewer products.
        rank: How many directions are wanted; fewer are returned where G has a lower rank.

    Source: Golub and Underwood 1977 (block Lanczos).

    Example:
        >>> matrix = torch.diag(torch.arange(1.0, 30.0, dtype=torch.float64))
        >>> _, values = leading_directions(matrix.mm, matrix.T.mm, matrix[:, ::7] + 1, 2)
        >>> [round(value, 9) for value in values.tolist()]
        [29.0, 28.0]
    """
    block = times(start)
    basis, images = block[:, :0], start[:, :0]
    scale = float(block.norm())
    while (new := _orthonormal(block, basis, _ROUNDING * scale)).shape[1]:
        image = transposed_times(new)
        basis, images = torch.cat([basis, new], 1), torch.cat([images, image], 1)
        squares, within = torch.linalg.eigh(images.T @ images)
        scale = float(squares[-1].clamp(min=0))
        # G Gᵀ of all vectors but the new ones lies in the span by construction, so what is left of the equation
        # G Gᵀ u = σ² u comes from these alone.
        block = times(image)
        outside = block - basis @ (basis.T @ block)
        left = (outside @ within[-new.shape[1] :, -rank:]).norm(dim=0)
        if float(left.max()) <= _FOUND * scale:
            break
    if not basis.shape[1]:
        return basis, start.new_zeros(1)
    directions = basis @ within[:, -rank:].flip(1)
    return directions, transposed_times(directions).norm(dim=0)


def _orthonormal(block: Tensor, basis: Tensor, least: float) -> Tensor:
    """Return orthonormal directions of vectors (k, b) outside a basis; what is shorter than `least` is left out."""
    for _ in range(2):  # once leaves what rounding hides
        block = block - basis @ (basis.T @ block)
    # Of few long vectors, from the few squares.
    squares, within = torch.linalg.eigh(block.T @ block)
    kept = (squares > least**2) & (squares > _ROUNDING * squares[-1])
    directions = block @ (within[:, kept] / squares[kept].sqrt())
    # Short ones were rounded before they were brought to length 1.
    return torch.linalg.qr(directions - basis @ (basis.T @ directions)).Q if directions.shape[1] else directions
