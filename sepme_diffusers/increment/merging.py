"""Increments as one change of each weight: what exports and adapters hold. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.peft_form import Factors


def merged(
    parts: Sequence[tuple[Increment, float]],
    weights: Mapping[str, Tensor],
    linears: Mapping[str, tuple[str, Tensor]],
) -> Factors:
    """Sum increments into one change of each weight, on the CPU: ranks side by side, strengths in C.

    An edit at a further door becomes a change of the Linear that reads its embedding, in the columns that do. Gates
    are left out: no change of weights can hold one.

    Args:
        parts: Increments with their strengths.
        weights: W_m (d_out, d) by module name.
        linears: {door: (module name, weight)}, see `doors.registry.door_linears`.

    Returns:
        Factors of one rank, the largest, filled up with zeros: readers of LoRA files differ in what they make of
        several ranks.

    Raises:
        ValueError: If an increment does not fit the weights, or acts at a door that no Linear reads.
    """
    a = _side_by_side(increment for increment, _ in parts)
    coefficients = [(increment.coefficients(weights), strength) for increment, strength in parts]
    factors = {
        module: (a, torch.cat([strength * c[module].cpu() for c, strength in coefficients], dim=1))
        for module in weights
    }
    for door in dict.fromkeys(door for increment, _ in parts for door in increment.doors):
        if door not in linears:
            raise ValueError(
                f"increments act at the door {door!r}, and no Linear of this base is known to read it: they cannot be "
                "written as a change of weights"
            )
        module, weight = linears[door]
        factors[module] = _at_linear([(i.doors[door], s) for i, s in parts if door in i.doors], weight)
    return _of_one_rank(factors)


def _at_linear(parts: Sequence[tuple[Increment, float]], weight: Tensor) -> tuple[Tensor, Tensor]:
    """The change [W B A, 0] of a weight [W, ...] whose first columns read the embedding."""
    a = _side_by_side(increment for increment, _ in parts)
    others = weight.shape[1] - a.shape[1]
    if others < 0:
        raise ValueError(f"another base: the embedding at a further door is {a.shape[1]} wide, not {weight.shape[1]}")
    w = weight[:, : a.shape[1]]
    c = [strength * increment.coefficients({"": w})[""].cpu() for increment, strength in parts]
    return pad(a, (0, others)), torch.cat(c, dim=1)


def _side_by_side(increments: Iterable[Increment]) -> Tensor:
    return torch.cat([increment.A.float().cpu() for increment in increments])


def _of_one_rank(factors: Factors) -> Factors:
    rank = max(len(a) for a, _ in factors.values())
    return {
        module: (pad(a, (0, 0, 0, rank - len(a))), pad(c, (0, rank - len(a)))) for module, (a, c) in factors.items()
    }


def in_half(factors: Factors) -> Factors:
    """Cast factors to float16. Rows of A are brought to length 1 first, so that their numbers are within its range.

    Raises:
        ValueError: If a number is too large for float16.
    """
    cast = {}
    for module, (a, c) in factors.items():
        lengths = a.norm(dim=1)
        lengths = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
        cast[module] = ((a / lengths[:, None]).half(), (c * lengths).half())
    if large := [module for module, (_, c) in cast.items() if not c.isfinite().all()]:
        raise ValueError(f"the changes of {large} are too large for float16")
    return cast
