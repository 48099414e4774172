"""Increments as rows: the tensors that stand in shards, an increment's digest, and back. Tensors in, tensors out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.encoding import TOKENS

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""The types of numbers that an increment may have, as safetensors names them."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_C = f"{TOKENS}.C."
# Numpy has no bfloat16; to move numbers takes their size alone.
_SAME_SIZE = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def as_rows(increment: Increment) -> dict[str, Tensor]:
    """Give an increment as tensors with one row per rank, sorted by name.

    "<door>.A" (r, d) and "<door>.B", the transposed B (r, d), of every door; in per-module form "tokens.C.<module>",
    the transposed C_m (r, d_out), instead of "tokens.B".

    Args:
        increment: The increment.
    """
    rows = {f"{TOKENS}.A": increment.A}
    if increment.B is not None:
        rows[f"{TOKENS}.B"] = increment.B.T
    rows |= {_C + module: c.T for module, c in (increment.C or {}).items()}
    for door, part in increment.doors.items():
        further = as_rows(part)
        rows |= {f"{door}.{factor}": further[f"{TOKENS}.{factor}"] for factor in "AB"}
    return {name: _in_rows(rows[name].detach().cpu()) for name in sorted(rows)}


def _in_rows(tensor: Tensor) -> Tensor:
    """Make a matrix contiguous, by numpy: it transposes small ones several times faster than torch."""
    if tensor.is_contiguous() or tensor.dtype not in _SAME_SIZE:
        return tensor.contiguous()
    numbers = np.ascontiguousarray(tensor.view(_SAME_SIZE[tensor.dtype]).numpy())
    return torch.from_numpy(numbers).view(tensor.dtype)


def from_rows(rows: Mapping[str, Tensor], gates: Mapping[str, float]) -> Increment:
    """Make the increment of which `as_rows` gave the rows.

    Args:
        rows: The tensors by name.
        gates: {door: gate}; doors without a gate are left out.

    Raises:
        ValueError: If these are not the rows of an increment, or a gate is of a door that it lacks.
    """
    c = {name.removeprefix(_C): tensor.T.contiguous() for name, tensor in rows.items() if name.startswith(_C)}
    factors: dict[str, dict[str, Tensor]] = {}
    for name in (name for name in rows if not name.startswith(_C)):
        door, _, factor = name.rpartition(".")
        factors.setdefault(door, {})[factor] = rows[name]
    own = factors.pop(TOKENS, {})
    wrong = {door: sorted(of_door) for door, of_door in factors.items() if of_door.keys() != {"A", "B"}}
    if own.keys() != ({"A"} if c else {"A", "B"}) or wrong:
        raise ValueError(f"these tensors are not an increment's: {sorted(rows)}")
    if unknown := sorted(gates.keys() - {TOKENS, *factors}):
        raise ValueError(f"there are gates for the doors {unknown}, which the increment lacks")
    doors = {door: Increment(f["A"], f["B"].T.contiguous(), gate=gates.get(door)) for door, f in factors.items()}
    b = own["B"].T.contiguous() if "B" in own else None
    return Increment(own["A"], b, c or None, gates.get(TOKENS), doors)


def digest(rows: Mapping[str, Tensor]) -> str:
    """Hash the rows of an increment: SHA-256, in hexadecimal digits, of their header as JSON and of their bytes.

    The header is [[name, type, shape], ...] in the order of the names, without spaces.

    Args:
        rows: See `as_rows`.
    """
    header = [[name, _NAMES[rows[name].dtype], list(rows[name].shape)] for name in sorted(rows)]
    hashed = hashlib.sha256(json.dumps(header, separators=(",", ":")).encode())
    for name in sorted(rows):
        hashed.update(as_bytes(rows[name]))
    return hashed.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the numbers of a contiguous tensor on the CPU as bytes."""
    numbers: Any = tensor.view(torch.uint8).numpy()
    return memoryview(numbers).cast("B")
