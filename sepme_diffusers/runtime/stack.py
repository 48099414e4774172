"""The factors of many increments side by side, and the masks that pick some of them. Tensors in, tensors out.

    change(e) = ((e Aᵀ) ⊙ mask ⊙ open(e)) Fᵀ

A mask holds the strengths of the active increments, in one row for a whole batch or one row a prompt. A mask of zeros
changes nothing, exactly; the order in which increments were asked for cannot leave a trace. Neither can what else is
loaded, which decides how many zeros are added up: sums are made in float64 and rounded once. `open` is 1 for the rows
of an increment whose gate the prompt opens, and of one that has none, else 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from sepme_diffusers.algebra.rounding import rounding_share
from sepme_diffusers.increment.increment import Increment

_FLOAT32 = torch.finfo(torch.float32).eps
# The key of a text-side increment's one factor B, which every module shares.
SHARED = ""


class Placed:
    """A tensor, copied to another device once, when it is first used there; in float32 where that has no float64."""

    def __init__(self, tensor: Tensor) -> None:
        self._copies = {str(tensor.device): tensor}

    def on(self, device: torch.device) -> Tensor:
        """The tensor on a device."""
        if str(device) not in self._copies:
            tensor = next(iter(self._copies.values()))
            narrow = device.type == "mps" and tensor.dtype == torch.float64
            self._copies[str(device)] = tensor.to(device, torch.float32 if narrow else tensor.dtype)
        return self._copies[str(device)]

    def copies(self) -> list[Tensor]:
        """The tensor on every device where it was used."""
        return list(self._copies.values())


class Stack:
    """Increments of one form, in the order given.

    Args:
        increments: By any key; all text-side or all per-module.
        width: R, filled up with zeros. Default: the sum of the ranks.
    """

    def __init__(self, increments: Mapping[Hashable, Increment], width: int | None = None) -> None:
        self.slices: dict[Hashable, slice] = {}
        used = 0
        for key, increment in increments.items():
            self.slices[key] = slice(used, used + increment.rank)
            used += increment.rank
        self.width = max(width or 0, used)
        found = list(increments.values())
        fill = (0, self.width - used)
        a = pad(torch.cat([one.A.double() for one in found]), (0, 0, *fill))
        # How coarsely a row of A is stored, beyond float32.
        coarse = [one.coarseness for one in found for _ in range(one.rank)]
        self.A, self.norms = Placed(a), Placed(a.norm(dim=1))
        self.coarseness = Placed(pad(torch.tensor(coarse, dtype=torch.float64), fill))
        self.gates = _Gates.of(self.slices, increments, self.width, self.width if width else len(found))
        outputs = [{SHARED: one.B.double()} if one.C is None else one.C for one in found]
        self.outputs = {
            name: Placed(pad(torch.cat([output[name] for output in outputs], dim=1), fill)) for name in outputs[0]
        }

    def tensors(self) -> list[Tensor]:
        """Every copy of every factor."""
        gates = () if self.gates is None else (self.gates.members, self.gates.squares)
        return [
            copy
            for placed in (self.A, self.norms, self.coarseness, *gates, *self.outputs.values())
            for copy in placed.copies()
        ]

    def mask(self, rows: Sequence[Mapping[Hashable, float]]) -> Tensor:
        """The strengths as a mask, (len(rows), 1, R); increments of other stacks are passed over."""
        values = [0.0] * (self.width * len(rows))
        for index, strengths in enumerate(rows):
            offset = index * self.width
            for key, strength in strengths.items():
                if (where := self.slices.get(key)) is not None:
                    values[offset + where.start : offset + where.stop] = [strength] * (where.stop - where.start)
        return torch.tensor(values, dtype=torch.float32).view(len(rows), 1, self.width)


@dataclass(frozen=True, eq=False)
class _Gates:
    """Which increments act on a prompt.

    Args:
        members: 1 where a row of A is an increment's, (R, K) for up to K increments; padding is of none.
        squares: Each increment's gate, squared; -1 where it has none, (K,).
    """

    members: Placed
    squares: Placed

    @classmethod
    def of(
        cls, slices: Mapping[Hashable, slice], increments: Mapping[Hashable, Increment], width: int, most: int
    ) -> _Gates | None:
        """The gates of increments, filled up to `most` of them; None if none has one."""
        if all(one.gate is None for one in increments.values()):
            return None
        members = torch.zeros(width, most, dtype=torch.float64)
        for index, where in enumerate(slices.values()):
            members[where, index] = 1.0
        squares = [-1.0 if one.gate is None else one.gate**2 for one in increments.values()]
        padded = pad(torch.tensor(squares, dtype=torch.float64), (0, most - len(squares)), value=-1.0)
        return cls(Placed(members), Placed(padded))

    def open(self, seen: Tensor) -> Tensor:
        """1 or 0 for each row of A, for what the tokens read (batch, n_tokens, R): (batch, 1, R)."""
        members, squares = self.members.on(seen.device), self.squares.on(seen.device)
        strongest = (seen.square() @ members).amax(dim=1, keepdim=True)
        return (strongest >= squares).to(members.dtype) @ members.T


@dataclass(frozen=True, eq=False)
class Acting:
    """A stack with the mask of what is active in it."""

    stack: Stack
    mask: Placed

    def read(self, embedding: Tensor) -> Tensor:
        """(e Aᵀ) ⊙ mask ⊙ open(e) for token rows e of shape (batch, n_tokens, d): (batch, n_tokens, R), float64.

        In float64 whatever the model's precision: a guarded token must meet A at full precision. What rounding leaves
        of e · a = 0 is set to zero, so that a guarded token is not changed by a single bit.

        Raises:
            ValueError: If the batch does not hold the mask's rows a whole number of times.
        """
        device, d = embedding.device, embedding.shape[-1]
        stack = self.stack
        a, norms, coarseness, mask = (p.on(device) for p in (stack.A, stack.norms, stack.coarseness, self.mask))
        # Of a dot product of d numbers: A was rounded to float32 or coarser, the embedding to its own precision.
        rounding = _FLOAT32 * d**0.5 + rounding_share(d, torch.finfo(embedding.dtype).eps + coarseness)
        with torch.autocast(device.type, enabled=False):
            e = embedding.to(a.dtype)
            seen = e @ a.T
            seen = seen.masked_fill(seen.abs() <= rounding * e.norm(dim=-1, keepdim=True) * norms, 0.0)
            if stack.gates is not None:
                seen = seen * stack.gates.open(seen)
            return seen * _for_batch(mask, len(e))

    def change(self, read: Tensor, name: str = SHARED) -> Tensor:
        """((e Aᵀ) ⊙ mask ⊙ open(e)) Fᵀ, float32, of what `read` gave."""
        with torch.autocast(read.device.type, enabled=False):
            factor = self.stack.outputs[name].on(read.device)
            if name == SHARED:
                return (read @ factor.T).float()
            return read.float() @ factor.float().T


def _for_batch(mask: Tensor, batch: int) -> Tensor:
    """The mask (rows, 1, R) for a batch that holds the rows once or several times over (guidance)."""
    if len(mask) in (1, batch):
        return mask
    if batch % len(mask):
        raise ValueError(
            f"the UNet was given a batch of {batch}, which is no multiple of the {len(mask)} erased sets asked for"
        )
    return mask.repeat(batch // len(mask), 1, 1)
