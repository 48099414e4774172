"""Banks' folders as tests compare and change them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sepme_diffusers import ConceptBank


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def same(bank: ConceptBank, other: ConceptBank) -> bool:
    def equal(entry, twin):
        mine, theirs = entry.increment.tensors(), twin.increment.tensors()
        factors = mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
        return (
            factors
            and entry.increment.gate == twin.increment.gate
            and replace(entry, increment=twin.increment) == twin
        )

    return list(bank) == list(other) and all(equal(entry, other[name]) for name, entry in bank.items())


def reseal(folder: Path, edit: Callable[[dict], object]) -> None:
    """Edit a bank's manifest and give it the digest that docs/format.md asks for, as a knowing tamperer would."""
    manifest = json.loads((folder / "sepme_bank.json").read_text("utf-8"))
    zeros = "0" * 64
    if "digest" in manifest:
        manifest["digest"] = zeros
    edit(manifest)
    data = json.dumps(manifest).encode()
    sealed = data.replace(zeros.encode(), hashlib.sha256(data).hexdigest().encode(), 1)
    (folder / "sepme_bank.json").write_bytes(sealed)
