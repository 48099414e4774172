"""The factors of many increments side by side, and the masks that pick some of them. Tensors in, tensors out.

    change(e) = ((e Aᵀ) ⊙ mask ⊙ open(e)) Fᵀ

A mask holds the strengths of the active increments, in one row for a whole batch or one row per picture. A mask of
zeros changes nothing, exactly; the order in which increments were asked for cannot leave a trace. Neither can what
else is loaded, which decides how many zeros are added up: sums are made in float64 and rounded once. `open` is 1 for
the rows of an increment whose gate the prompt opens, by what is read of it or because it spells the concept, and of
one that has none, else 0.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sepme_diffusers.algebra.rounding import rounding_share
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.names import some

_FLOAT32 = torch.finfo(torch.float32).eps
# The key of a text-side increment's one factor B, which every module shares.
SHARED = ""


class DeviceTensor:
    """A tensor, copied to another device once, when it is first used there; in float32 where that has no float64."""

    def __init__(self, tensor: Tensor) -> None:
        self._copies = {str(tensor.device): tensor}

    def on(self, device: torch.device) -> Tensor:
        """Return the tensor on a device."""
        if str(device) not in self._copies:
            tensor = next(iter(self._copies.values()))
            narrow = device.type == "mps" and tensor.dtype == torch.float64
            # Of two threads that copy at once, both go on with the first one's copy.
            self._copies.setdefault(str(device), tensor.to(device, torch.float32 if narrow else tensor.dtype))
        return self._copies[str(device)]

    def copies(self) -> list[Tensor]:
        """Return the tensor on every device where it was used."""
        return list(self._copies.values())


class Stack:
    """Increments of one form at one door, in the order given.

    Args:
        increments: By any key; all text-side or all per-module.
        width: R, filled up with zeros. Default: the sum of the ranks.
    """

    def __init__(self, increments: Mapping[Any, Increment], width: int | None = None) -> None:
        self.slices: dict[Any, slice] = {}
        used = 0
        for key, increment in increments.items():
            self.slices[key] = slice(used, used + increment.rank)
            used += increment.rank
        self.width = max(width or 0, used)
        parts = list(increments.values())
        fill = (0, self.width - used)
        a = pad(torch.cat([part.A.double() for part in parts]), (0, 0, *fill))
        # How coarsely a row of A is stored, beyond float32.
        coarse = [part.coarseness for part in parts for _ in range(part.rank)]
        self.A, self.norms = DeviceTensor(a), DeviceTensor(a.norm(dim=1))
        self.coarseness = DeviceTensor(pad(torch.tensor(coarse, dtype=torch.float64, device=a.device), fill))
        self.gates = _Gates.of(self.slices, increments, self.width, self.width if width else len(parts))
        outputs = [dict(part.C or {}) if part.B is None else {SHARED: part.B.double()} for part in parts]
        self.outputs = {
            name: DeviceTensor(pad(torch.cat([output[name] for output in outputs], dim=1), fill))
            for name in outputs[0]
        }

    def parts(self) -> list[DeviceTensor]:
        """Everything that is stacked."""
        gates = () if self.gates is None else (self.gates.members, self.gates.squares)
        return [self.A, self.norms, self.coarseness, *gates, *self.outputs.values()]

    def tensors(self) -> list[Tensor]:
        """Return every copy of every factor."""
        return [copy for part in self.parts() for copy in part.copies()]

    def mask(self, rows: Sequence[Mapping[Any, float]]) -> Tensor:
        """Return the strengths as a mask, (len(rows), 1, R).

        Raises:
            KeyError: If an increment is not in the stack: it would be passed over.
        """
        values = [0.0] * (self.width * len(rows))
        for index, strengths in enumerate(rows):
            offset = index * self.width
            for key, strength in strengths.items():
                if key not in self.slices:
                    raise KeyError(f"{key} is not in this stack, which has {some(self.slices)}")
                where = self.slices[key]
                values[offset + where.start : offset + where.stop] = [strength] * (where.stop - where.start)
        return torch.tensor(values, dtype=torch.float32, device="cpu").view(len(rows), 1, self.width)

    def opened_for(self, pictures: Sequence[Collection[Any]]) -> Tensor | None:
        """Return which gates are open whatever is read, (pictures, 1, K): of the increments named for each picture."""
        if self.gates is None or not pictures:
            return None
        keys = list(self.slices)
        opened = torch.zeros(len(pictures), 1, len(self.gates.squares.copies()[0]), dtype=torch.bool, device="cpu")
        for picture, named in enumerate(pictures):
            opened[picture, 0, [index for index, key in enumerate(keys) if key in named]] = True
        return opened


@dataclass(frozen=True, eq=False)
class _Gates:
    """Which increments act on a prompt.

    Args:
        members: 1 where a row of A is an increment's, (R, K) for up to K increments; padding is of none.
        squares: Each increment's gate, squared; -1 where it has none, (K,).
    """

    members: DeviceTensor
    squares: DeviceTensor

    @classmethod
    def of(
        cls, slices: Mapping[Any, slice], increments: Mapping[Any, Increment], width: int, most: int
    ) -> _Gates | None:
        """Return the gates of increments, filled up to `most` of them; None if none has one."""
        if all(increment.gate is None for increment in increments.values()):
            return None
        members = torch.zeros(width, most, dtype=torch.float64, device="cpu")
        for index, where in enumerate(slices.values()):
            members[where, index] = 1.0
        squares = [-1.0 if increment.gate is None else increment.gate**2 for increment in increments.values()]
        padded = pad(torch.tensor(squares, dtype=torch.float64, device="cpu"), (0, most - len(squares)), value=-1.0)
        return cls(DeviceTensor(members), DeviceTensor(padded))

    def open(self, seen: Tensor) -> Tensor:
        """Return whether each increment's gate opens, for what the tokens read (batch, n_tokens, R): (batch, 1, K)."""
        members, squares = self.members.on(seen.device), self.squares.on(seen.device)
        return (seen.square() @ members).amax(dim=1, keepdim=True) >= squares


class ActiveStack:
    """A stack with the mask of what is active in it, and a record of the gates that opened.

    Args:
        stack: The stack.
        mask: Strengths, (rows, 1, R): one row for a whole batch, or one per picture.
        pictures: How many pictures the record tells apart.
        least: What a reading must exceed to count, as a share of ‖e‖ ‖a‖; more than rounding alone, where the text
            encoder is coarser than its numbers look.
        open: The gates that are open whatever is read, (rows, 1, K); see `Stack.opened_for`.
    """

    def __init__(
        self, stack: Stack, mask: Tensor, pictures: int = 1, least: float = 0.0, open: Tensor | None = None
    ) -> None:
        self.stack, self.mask = stack, DeviceTensor(mask)
        self.least = DeviceTensor(torch.tensor(least, dtype=torch.float64, device="cpu"))
        members = 0 if stack.gates is None else len(stack.gates.squares.copies()[0])
        self.opened = DeviceTensor(torch.zeros(pictures, members, dtype=torch.bool, device="cpu"))
        # Always a tensor, so that a compiled graph does not depend on it.
        self.open = DeviceTensor(torch.zeros(1, 1, members, dtype=torch.bool, device="cpu") if open is None else open)

    def copy_to(self, device: torch.device) -> None:
        """Copy everything to a device, so that no pass has to."""
        for part in (*self.stack.parts(), self.mask, self.least, self.opened, self.open):
            part.on(device)

    def read(self, embedding: Tensor, pictures: int | None = None) -> Tensor:
        """Compute (e Aᵀ) ⊙ mask ⊙ open(e), (batch, n_tokens, R) in float64, for token rows e (batch, n_tokens, d).

        In float64 whatever the model's precision: a guarded token must meet A at full precision. What rounding leaves
        of e · a = 0 is set to zero, so that a guarded token is not changed by a single bit.

        Args:
            embedding: e.
            pictures: The rows of the sample; a video has several text rows for each. Default: as many as text rows.

        Raises:
            ValueError: If the batch does not hold the mask's rows a whole number of times.
        """
        device, batch = embedding.device, len(embedding)
        each = batch // pictures if pictures and batch % pictures == 0 else 1
        with torch.autocast(device.type, enabled=False):
            seen = self._seen(embedding)
            if self.stack.gates is not None:
                gates = self._open(self.stack.gates, seen, each)
                self._record(gates.detach(), each)
                seen = seen * (gates.to(seen.dtype) @ self.stack.gates.members.on(device).T)
            return seen * _for_batch(self.mask.on(device), batch, each)

    def look(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what a pass decides by, for token rows (batch, n_tokens, d); record nothing.

        Returns:
            For each increment of the stack what it reads of each token, ‖e_t Aᵀ‖, (batch, n_tokens, K) in float64; the
            most of a prompt is what its gate is compared with. And whether it is open, (batch, K).
        """
        with torch.autocast(embedding.device.type, enabled=False):
            seen, gates, slices = self._seen(embedding), self.stack.gates, self.stack.slices.values()
            readings = torch.stack([seen[..., where].norm(dim=-1) for where in slices], dim=-1)
            if gates is None:
                return readings, torch.ones_like(readings[:, 0], dtype=torch.bool)
            return readings, self._open(gates, seen, 1)[:, 0, : len(slices)]

    def _seen(self, embedding: Tensor) -> Tensor:
        """Compute e Aᵀ, with what rounding leaves of zero set to zero."""
        device, d, stack = embedding.device, embedding.shape[-1], self.stack
        a, norms, coarseness = (tensor.on(device) for tensor in (stack.A, stack.norms, stack.coarseness))
        # Of a dot product of d numbers: A was rounded to float32 or coarser, the embedding to its own precision.
        rounding = _FLOAT32 * d**0.5 + rounding_share(d, torch.finfo(embedding.dtype).eps + coarseness)
        rounding = torch.maximum(rounding, self.least.on(device))
        e = embedding.to(a.dtype)
        seen = e @ a.T
        return seen.masked_fill(seen.abs() <= rounding * e.norm(dim=-1, keepdim=True) * norms, 0.0)

    def _open(self, gates: _Gates, seen: Tensor, each: int) -> Tensor:
        """Decide which gates are open, (batch, 1, K): by what was read, or whatever was read."""
        return gates.open(seen) | _for_any_batch(self.open.on(seen.device), len(seen), each)

    def _record(self, gates: Tensor, each: int) -> None:
        """Note, without waiting for the device, which gates of which picture opened."""
        opened = self.opened.on(gates.device)
        pictures, batch = len(opened), len(gates)
        if batch % (pictures * each):
            opened.logical_or_(gates.amax(dim=(0, 1)))
        else:
            opened.logical_or_(gates.view(-1, pictures, each, gates.shape[-1]).amax(dim=(0, 2)))

    def note_opened(self, other: ActiveStack, row: int, picture: int, keys: Iterable[Hashable]) -> None:
        """Note the gates that opened for a row of another record as those of a picture of this one.

        Does not wait for the device.
        """
        mine, theirs = list(self.stack.slices), list(other.stack.slices)
        pairs = [(mine.index(key), theirs.index(key)) for key in keys if key in mine and key in theirs]
        if self.stack.gates is None or other.stack.gates is None:
            return
        for copy in other.opened.copies():
            opened = self.opened.on(copy.device)
            for index, there in pairs:
                opened[picture, index].logical_or_(copy[row, there])

    def change(self, read: Tensor, name: str = SHARED) -> Tensor:
        """Compute ((e Aᵀ) ⊙ mask ⊙ open(e)) Fᵀ, float32, of what `read` gave."""
        with torch.autocast(read.device.type, enabled=False):
            factor = self.stack.outputs[name].on(read.device)
            if name == SHARED:
                return (read @ factor.T).float()
            return read.float() @ factor.float().T

    def edited(self, embedding: Tensor, pictures: int | None = None) -> Tensor:
        """Compute e + change(e) in e's precision, for an embedding (batch, n_tokens, d) or a pooled one (batch, d)."""
        tokens = embedding if embedding.ndim == 3 else embedding[:, None]
        return embedding + self.change(self.read(tokens, pictures)).to(embedding.dtype).view_as(embedding)


def _for_batch(mask: Tensor, batch: int, each: int) -> Tensor:
    """The mask (rows, 1, R) for a batch that holds the rows once or several times over (guidance)."""
    if len(mask) == 1:
        return mask
    if batch % (len(mask) * each):
        raise ValueError(
            f"the denoiser was given a batch of {batch // each} pictures, which is no multiple of the {len(mask)} "
            "erased sets asked for"
        )
    return mask.repeat(batch // (len(mask) * each), 1, 1).repeat_interleave(each, dim=0)


def _for_any_batch(open: Tensor, batch: int, each: int) -> Tensor:
    """The open gates (rows, 1, K) for a batch, as `_for_batch`; where it holds other rows, what is open for any."""
    if batch % (len(open) * each):
        return open.any(dim=0, keepdim=True)
    return _for_batch(open, batch, each)
