"""What a bank holds, read from a folder and written into one."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sepme_diffusers.bank.disk.folder import BankFolder
from sepme_diffusers.bank.disk.layout import MANIFEST
from sepme_diffusers.bank.disk.signing import verify_signature
from sepme_diffusers.bank.disk.store import Store
from sepme_diffusers.bank.entries import Entries
from sepme_diffusers.bank.entry import BaseModel
from sepme_diffusers.bank.errors import BankError, short
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.names import some
from sepme_diffusers.text.spelling import look_alikes

logger = logging.getLogger(__name__)  # see adapters.py

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
    entries: Entries = field(default_factory=lambda: Entries({}))
    always: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", Entries(self.entries))
        # What was read from a folder was checked with its manifest.
        made = self.entries.in_memory()
        if wrong := {key: e.concept.name for key, e in made.items() if key != e.concept.name}:
            raise ValueError(f"entries under another name than their concept's: {wrong}")
        if made and (alike := look_alikes(self.entries)):
            raise ValueError(f"concepts that nobody can tell apart: {alike}; give them other names")
        self._refuse_other_shapes({name: entry.increment for name, entry in made.items()})
        if unknown := sorted(set(self.always) - set(self.entries)):
            raise ValueError(f"the policy always erases {unknown}, which the bank lacks; it has {some(self.entries)}")

    def _refuse_other_shapes(self, increments: Mapping[str, Increment]) -> None:
        widths = {key: increment.A.shape[1] for key, increment in increments.items()}
        if wrong := {key: width for key, width in widths.items() if width != self.base.width}:
            raise ValueError(
                f"the bank is for embeddings of width {self.base.width}; these increments differ: {wrong}"
            )
        if misfits := [key for key, increment in increments.items() if not _fits(increment, self.base)]:
            raise ValueError(f"these increments edit other modules than the base's, or of other heights: {misfits}")
        known = {name: door.width for name, door in self.base.doors.items()}
        doors = {key: {n: part.A.shape[1] for n, part in i.doors.items()} for key, i in increments.items()}
        if strange := {key: own for key, own in doors.items() if not own.items() <= known.items()}:
            raise ValueError(f"the base has the doors {known}; these increments differ: {strange}")


@contextmanager
def _collecting_paused() -> Iterator[None]:
    """Keep Python from looking for garbage: a manifest becomes hundreds of thousands of objects, and none is any."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@_collecting_paused()
def read(folder: Path, wanted: Sequence[str] | None = None, public_key: str | Path | None = None) -> Contents:
    """Read the bank in a folder, or the part of it with the wanted concepts.

    Every file is checked against its hash. The numbers of an increment are read, and checked again, when somebody asks
    for them. Another process may save there meanwhile: where the manifest was replaced while a file was missing or not
    what its hash says, the bank is read again.

    Args:
        folder: The bank's.
        wanted: Names, or None for all.
        public_key: PEM file: refuse a bank that is not signed with its private half.

    Raises:
        BankError: If anything is missing, damaged, unsafe, not signed as required or of another format version.
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
    store = Store(bank, manifest)
    store.open()
    try:
        return Contents(store.base, store.entries(), tuple(manifest["policy"]["always"]))
    except (TypeError, ValueError) as error:
        if isinstance(error, BankError):
            raise
        raise BankError(f"{bank.folder / MANIFEST} is not a valid bank manifest: {short(error)}") from error


def _fits(increment: Increment, base: BaseModel) -> bool:
    heights = {module: d_out for module, (d_out, _) in (base.projections or {}).items()}
    return increment.C is None or {module: len(c) for module, c in increment.C.items()} == heights
