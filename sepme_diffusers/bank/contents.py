"""What a bank holds, read from a folder and written into one."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sepme_diffusers.bank.card import Picture, model_card
from sepme_diffusers.bank.entry import BaseModel, Entry, base_model, entry_of
from sepme_diffusers.bank.errors import BankError
from sepme_diffusers.bank.folder import BankFolder, ConceptFiles, increment_files
from sepme_diffusers.bank.layout import CARD, MANIFEST
from sepme_diffusers.bank.signing import verify_signature
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.spelling import look_alikes

# How often a bank that others save meanwhile is read before that is given up.
_ATTEMPTS = 10


@dataclass(frozen=True)
class Contents:
    """What a bank holds. Immutable.

    Args:
        base: What the increments were made on.
        entries: {concept name: entry}, in the order in which increments are added up.
        always: Names that may never be restored while the bank is loaded.

    Raises:
        ValueError: If an entry's key is not its concept's name, two names look alike, widths, edited modules or
            further doors are not the base's, or `always` names a concept that is not there.
    """

    base: BaseModel
    entries: Mapping[str, Entry] = field(default_factory=dict)
    always: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", dict(self.entries))
        if wrong := {key: e.concept.name for key, e in self.entries.items() if key != e.concept.name}:
            raise ValueError(f"entries under another name than their concept's: {wrong}")
        if alike := look_alikes(self.entries):
            raise ValueError(f"concepts that nobody can tell apart: {alike}; give them other names")
        self._refuse_other_shapes()
        if unknown := sorted(set(self.always) - set(self.entries)):
            raise ValueError(f"the policy always erases {unknown}, which the bank lacks; it has {list(self.entries)}")

    def _refuse_other_shapes(self) -> None:
        increments = {key: entry.increment for key, entry in self.entries.items()}
        widths = {key: increment.A.shape[1] for key, increment in increments.items()}
        if wrong := {key: width for key, width in widths.items() if width != self.base.width}:
            raise ValueError(
                f"the bank is for embeddings of width {self.base.width}; these increments differ: {wrong}"
            )
        heights = {module: d_out for module, (d_out, _) in self.base.projections.items()}
        if misfits := [key for key, increment in increments.items() if not _fits(increment, heights)]:
            raise ValueError(f"these increments edit other modules than the base's, or of other heights: {misfits}")
        doors = {key: {n: part.A.shape[1] for n, part in i.doors.items()} for key, i in increments.items()}
        if strange := {key: own for key, own in doors.items() if not own.items() <= self.base.doors.items()}:
            raise ValueError(f"the base has further doors {dict(self.base.doors)}; these increments differ: {strange}")


def read(folder: Path, wanted: Sequence[str] | None = None, public_key: str | Path | None = None) -> Contents:
    """Read the bank in a folder, or the part of it with the wanted concepts, every hash checked.

    Another process may save there meanwhile: where the manifest was replaced while a file was missing or not what its
    hash says, the bank is read again.

    Args:
        folder: The bank's.
        wanted: Names, or None for all.
        public_key: PEM file: refuse a bank that is not signed with its private half.

    Raises:
        BankError: If anything is missing, damaged, unsafe, not signed as required or of a newer format.
        KeyError: If the bank lacks one of the wanted.
        PolicyError: If `wanted` leaves out a concept that the policy always erases.
    """
    bank = BankFolder(folder)
    for attempt in range(1, _ATTEMPTS + 1):
        data = bank.manifest_bytes()
        try:
            verified = data if public_key is None else verify_signature(folder, public_key)
            return _parsed(bank, verified, wanted)
        except BankError:
            if attempt == _ATTEMPTS or bank.manifest_bytes() == data:
                raise
    raise AssertionError("the last attempt returns or raises")


def _parsed(bank: BankFolder, data: bytes, wanted: Sequence[str] | None) -> Contents:
    manifest = bank.manifest(wanted, data)
    records = manifest["concepts"]
    increments = {name: bank.increment(name, record, manifest["base"]) for name, record in records.items()}
    try:
        entries = {name: entry_of(name, records[name], increment) for name, increment in increments.items()}
        return Contents(base_model(manifest), entries, tuple(manifest["policy"]["always"]))
    except (TypeError, ValueError) as error:
        raise BankError(f"{bank.folder / MANIFEST} is not a valid bank manifest: {error}") from error


def write(
    contents: Contents,
    folder: Path,
    dtype: torch.dtype | None = torch.float32,
    license: str | None = None,
    pictures: Iterable[Picture] = (),
) -> None:
    """Write a bank into a folder; see `ConceptBank.save_pretrained`.

    Args:
        contents: What to write.
        folder: See there, as the others.
        dtype: See there.
        license: See there.
        pictures: See there.

    Raises:
        BankError: See there.
    """
    head = {
        "libraries": libraries(),
        # A base without further doors does not name them.
        "base": {key: value for key, value in vars(contents.base).items() if key != "doors" or value},
        "policy": {"always": list(contents.always)},
    }
    pictures = tuple(pictures)
    previous = (folder / CARD).read_text("utf-8", errors="replace") if (folder / CARD).is_file() else None
    BankFolder(folder).write(
        head,
        (_files(entry, dtype) for entry in contents.entries.values()),
        lambda manifest: model_card(manifest, None, license, pictures, previous),
        {picture.path: picture.png() for picture in pictures},
    )


def libraries() -> dict[str, str]:
    """List the versions of what made a bank."""
    names = ("sepme_diffusers", "torch", "diffusers", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _fits(increment: Increment, heights: Mapping[str, int]) -> bool:
    return increment.C is None or {module: len(c) for module, c in increment.C.items()} == heights


def _files(entry: Entry, dtype: torch.dtype | None) -> ConceptFiles:
    record: dict[str, Any] = {
        "form": entry.increment.form,
        "rank": entry.increment.rank,
        "concept": {key: value for key, value in entry.concept.to_dict().items() if key != "name"},
        "guards": list(entry.guards),
        "config": entry.config.to_dict(),
        "metrics": dict(entry.metrics),
    }
    if entry.increment.gate is not None:
        record["gate"] = entry.increment.gate
    doors = entry.increment.doors.items()
    if gates := {name: increment.gate for name, increment in doors if increment.gate is not None}:
        record["gates"] = gates
    try:
        files = increment_files(entry.increment, dtype)
    except ValueError as error:
        raise BankError(f"concept {entry.concept.name!r} cannot be saved as {dtype}: {error}") from error
    return ConceptFiles(entry.concept.name, entry.concept.slug, files, record)
