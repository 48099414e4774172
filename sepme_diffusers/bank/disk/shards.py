"""Shards: files that hold the rows of many increments, and what is read of them when somebody asks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from sepme_diffusers.bank.disk.held import HeldFile
from sepme_diffusers.bank.disk.layout import shard_name
from sepme_diffusers.bank.errors import BankError, short
from sepme_diffusers.bank.rows import DTYPES, digest

# A shard is closed once it holds this much, so that a few concepts of many can be downloaded alone.
_FULL = 8 * 2**20
# A header names a tensor in some 150 bytes; a base has at most 10,000 modules.
_LARGEST_HEADER = 4 * 2**20

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


class ShardFile:
    """A shard, of which rows are read when somebody asks.

    Args:
        file: The file.

    Raises:
        BankError: If it is no safetensors file.
    """

    def __init__(self, file: HeldFile) -> None:
        self.path, self._file = file.path, file
        try:
            size = int.from_bytes(file.read(0, 8), "little")
            if size > min(_LARGEST_HEADER, file.size - 8):
                raise ValueError(f"a header of {size} bytes")
            self._header: dict[str, Any] = dict(json.loads(file.read(8, size)))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise BankError(f"{self.path} is no safetensors file: {short(error)}") from error
        self._header.pop("__metadata__", None)
        self._data = 8 + size

    def rows(self, places: Mapping[str, tuple[int, int]], expected: str) -> dict[str, Tensor]:
        """Copy the rows of one increment out, and check the copy.

        Args:
            places: {door: (first row, row behind the last)}.
            expected: The increment's digest.

        Raises:
            BankError: If there are no such rows, or they are not those that the digest is of.
        """
        try:
            # A copy: whoever changes the file after the check changes nothing that was checked.
            rows = {name: self._rows(name, *places[door]) for door, name in self._named() if door in places}
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise BankError(f"{self.path} does not hold the rows {short(dict(places))}: {short(error)}") from error
        if digest(rows) != expected:
            raise BankError(f"{self.path} is damaged or was changed (the SHA-256 of {short(dict(places))} is another)")
        return rows

    def _named(self) -> list[tuple[str, str]]:
        """The tensors, each with its door."""
        return [(name.split(".")[0], name) for name in self._header]

    def _rows(self, name: str, first: int, behind: int) -> Tensor:
        said = self._header[name]
        (height, width), (start, end), dtype = said["shape"], said["data_offsets"], DTYPES[said["dtype"]]
        of_row = width * dtype.itemsize
        known = all(type(number) is int for number in (height, width, start, end))
        if not known or width < 1 or not 0 <= first < behind <= height:
            raise ValueError(f"{name} has the shape {said['shape']}")
        if start < 0 or end - start != height * of_row or self._data + end > self._file.size:
            raise ValueError(f"{name} stands at {said['data_offsets']}, and the file has {self._file.size} bytes")
        data = self._file.read(self._data + start + first * of_row, (behind - first) * of_row)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(behind - first, width)
