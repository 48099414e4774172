"""TensorFile: a safetensors file of which single tensors, or some of their rows, are read when somebody asks."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.bank.disk.held import HeldFile
from sepme_diffusers.bank.errors import BankError, short
from sepme_diffusers.bank.rows import DTYPES

# A header names a tensor in some 150 bytes; a base has at most 10,000 modules.
_LARGEST_HEADER = 4 * 2**20


class TensorFile:
    """A safetensors file. Only its header is read at first.

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

    @property
    def names(self) -> list[str]:
        """What the tensors are called."""
        return list(self._header)

    def tensor(self, name: str, first: int = 0, behind: int | None = None) -> Tensor:
        """Copy rows of a matrix out.

        Args:
            name: The tensor's.
            first: The first row.
            behind: The row behind the last. Default: all that follow.

        Raises:
            BankError: If there is no such matrix, or it has no such rows.
        """
        try:
            return self._rows(name, first, behind)
        except (OSError, KeyError, TypeError, ValueError) as error:
            which = f"the rows {first} to {'the last' if behind is None else behind} of {short(name)}"
            raise BankError(f"{self.path} does not hold {which}: {short(error)}") from error

    def _rows(self, name: str, first: int, behind: int | None) -> Tensor:
        said = self._header[name]
        (height, width), (start, end), dtype = said["shape"], said["data_offsets"], DTYPES[said["dtype"]]
        if not all(type(number) is int for number in (height, width, start, end)):
            raise ValueError(f"its shape is {said['shape']}, and it stands at {said['data_offsets']}")
        behind = height if behind is None else behind
        if width < 1 or not 0 <= first < behind <= height:
            raise ValueError(f"its shape is {said['shape']}")
        of_row = width * dtype.itemsize
        if start < 0 or end - start != height * of_row or self._data + end > self._file.size:
            raise ValueError(f"it stands at {said['data_offsets']}, and the file has {self._file.size} bytes")
        data = self._file.read(self._data + start + first * of_row, (behind - first) * of_row)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(behind - first, width)
