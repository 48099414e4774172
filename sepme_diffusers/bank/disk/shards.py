"""Shards: files that hold the rows of many increments, and what is read of them when somebody asks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from sepme_diffusers.bank.disk.layout import shard_name
from sepme_diffusers.bank.disk.tensor_file import TensorFile
from sepme_diffusers.bank.errors import BankError, short
from sepme_diffusers.bank.rows import digest

# A shard is closed once it holds this much, so that a few concepts of many can be downloaded alone.
_FULL = 8 * 2**20

Rows = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shard:
    """A file of rows, as it is written.

    Args:
        data: The content.
        places: {concept: {door: (first row, row behind the last)}}.
    """

    data: bytes
    places: Mapping[str, Mapping[str, tuple[int, int]]]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def name(self) -> str:
        """What the file is called."""
        return shard_name(self.sha256)


def shards_of(increments: Iterable[tuple[str, Rows]]) -> Iterator[Shard]:
    """Put the rows of increments into shards: those of one kind side by side, until a shard is full.

    Args:
        increments: (concept, rows) of each, see `rows.as_rows`.
    """
    open_ones: dict[Any, list[tuple[str, Rows]]] = {}
    sizes: dict[Any, int] = {}
    for concept, rows in increments:
        kind = tuple((name, tensor.dtype, tensor.shape[1]) for name, tensor in sorted(rows.items()))
        open_ones.setdefault(kind, []).append((concept, rows))
        sizes[kind] = sizes.get(kind, 0) + sum(tensor.nbytes for tensor in rows.values())
        if sizes[kind] >= _FULL:
            del sizes[kind]
            yield _shard(open_ones.pop(kind))
    for members in open_ones.values():
        yield _shard(members)


def _shard(members: list[tuple[str, Rows]]) -> Shard:
    names = sorted(members[0][1])
    places: dict[str, dict[str, tuple[int, int]]] = {concept: {} for concept, _ in members}
    for name in (name for name in names if name.endswith(".A")):
        first = 0
        for concept, rows in members:
            places[concept][name.removesuffix(".A")] = (first, first + len(rows[name]))
            first += len(rows[name])
    tensors = {name: torch.cat([rows[name] for _, rows in members]) for name in names}
    return Shard(save_tensors(tensors, {"format": "pt"}), places)


class ShardFile(TensorFile):
    """A shard, of which rows are read when somebody asks."""

    def rows(self, places: Mapping[str, tuple[int, int]], expected: str) -> dict[str, Tensor]:
        """Copy the rows of one increment out, and check the copy.

        Args:
            places: {door: (first row, row behind the last)}.
            expected: The increment's digest.

        Raises:
            BankError: If there are no such rows, or they are not those that the digest is of.
        """
        # A copy: whoever changes the file after the check changes nothing that was checked.
        doors = {name: name.split(".")[0] for name in self.names}
        rows = {name: self.tensor(name, *places[door]) for name, door in doors.items() if door in places}
        if digest(rows) != expected:
            raise BankError(f"{self.path} is damaged or was changed (the SHA-256 of {short(dict(places))} is another)")
        return rows

    def bases(self, places: Mapping[str, tuple[int, int]]) -> dict[str, Tensor]:
        """Copy the A of one increment out, by door. A digest is of all rows, so none checks these alone.

        Args:
            places: See `rows`.

        Raises:
            BankError: If there are no such rows.
        """
        return {door: self.tensor(f"{door}.A", *place) for door, place in places.items()}
