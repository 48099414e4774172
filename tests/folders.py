"""Banks' folders as tests compare and change them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sepme_diffusers import ConceptBank
from sepme_diffusers.bank.disk.layout import MANIFEST

SHARD = re.compile(r"increments-[0-9a-f]{16}\.safetensors")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def same(bank: ConceptBank, other: ConceptBank) -> bool:
    """Whether two banks hold the same entries in the same order, every number included."""

    def equal(entry, twin):
        mine, theirs = entry.increment.tensors(), twin.increment.tensors()
        factors = mine.keys() == theirs.keys() and all(
            mine[key].dtype == theirs[key].dtype and torch.equal(mine[key], theirs[key]) for key in mine
        )
        return factors and entry.gates == twin.gates and replace(entry, increment=twin.increment) == twin

    return list(bank) == list(other) and all(equal(entry, other[name]) for name, entry in bank.items())


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text("utf-8"))


def shard_of(folder: Path, concept: str) -> Path:
    """The shard that holds a concept of a saved bank."""
    return folder / manifest_of(folder)["concepts"][concept]["shard"]


def replace_shard(folder: Path, concept: str, data: bytes, digest: str | None = None) -> Path:
    """Put other bytes into the shard of a concept, named, sized, hashed and sealed as a knowing tamperer would.

    `digest` is what its record then says of the increment. Default: what it said.
    """
    old, sha = shard_of(folder, concept), hashlib.sha256(data).hexdigest()
    new = old.with_name(f"increments-{sha[:16]}.safetensors")
    old.unlink()
    new.write_bytes(data)

    def edit(manifest: dict) -> None:
        del manifest["shards"][old.name]
        manifest["shards"][new.name] = {"sha256": sha, "bytes": len(data)}
        for record in manifest["concepts"].values():
            if record.get("shard") == old.name:
                record["shard"] = new.name
        if digest is not None:
            manifest["concepts"][concept]["digest"] = digest

    reseal(folder, edit)
    return new


def reseal(folder: Path, edit: Callable[[dict], object]) -> None:
    """Edit a bank's manifest and give it the digest that docs/format.md asks for, as a knowing tamperer would."""
    manifest = manifest_of(folder)
    zeros = "0" * 64
    if "digest" in manifest:
        manifest["digest"] = zeros
    edit(manifest)
    data = json.dumps(manifest).encode()
    sealed = data.replace(zeros.encode(), hashlib.sha256(data).hexdigest().encode(), 1)
    (folder / MANIFEST).write_bytes(sealed)
