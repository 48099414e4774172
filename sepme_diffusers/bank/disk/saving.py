"""Saving: what a bank's folder holds is replaced by another bank, wholly or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sepme_diffusers.bank.disk import manifest as manifests
from sepme_diffusers.bank.disk.files import persist, persist_tree, replace_file, write_file
from sepme_diffusers.bank.disk.folder import BankFolder, sha256, top_names
from sepme_diffusers.bank.disk.layout import ASSETS, CARD, FORMER, LOCK, MANIFEST, STAGING
from sepme_diffusers.bank.errors import BankError


class Place:
    """Where a save puts its files: under names that nothing refers to yet.

    Args:
        folder: The bank's.
        former: The manifest that is being replaced; None in a new folder.
    """

    def __init__(self, folder: BankFolder, former: Mapping[str, Any] | None) -> None:
        self.folder, self.former = folder, former
        # Names in the folder that are taken, and whether a file or folder of that name has to be moved there.
        self._taken: dict[str, bool] = {ASSETS: False}
        self._undamaged: dict[str, bool] = {}

    @property
    def moves(self) -> list[str]:
        """The names that have been prepared and must be moved into place."""
        return [name for name, prepared in self._taken.items() if prepared]

    def keep(self, name: str, files: Mapping[str, str]) -> bool:
        """Go on using a shard or folder that is there, if it is undamaged; tell whether it is.

        Args:
            name: Of the shard or folder.
            files: {path: SHA-256} of its files.
        """
        if name not in self._undamaged:
            self._undamaged[name] = all(self.folder.holds(path, digest) for path, digest in files.items())
        if self._undamaged[name]:
            self._taken.setdefault(name, False)
        return self._undamaged[name]

    def put(self, name: str, data: bytes) -> None:
        """Prepare a file whose name says its content.

        Raises:
            BankError: If a folder has its name.
        """
        if name in self._taken:
            return
        path = self.folder.folder / name
        if path.is_dir() and not path.is_symlink():
            raise BankError(f"{path} is a folder, and a file of the bank goes there; remove it and save again")
        self._taken[name] = not self._holds({name: data})
        if self._taken[name]:
            (self.folder.folder / STAGING / name).write_bytes(data)

    def put_folder(self, slug: str, concept: str, files: Mapping[str, bytes]) -> str:
        """Prepare a concept's folder, and return its name: the slug, with a hash where that is other content.

        Raises:
            BankError: If both names are taken.
        """
        other = sha256(b"\0".join([concept.encode(), *files.values()]))[:12]
        for name in (slug, f"{slug}-{other}"):
            exists = os.path.lexists(self.folder.folder / name)
            if name in self._taken or (exists and not self._holds({f"{name}/{file}": d for file, d in files.items()})):
                continue
            self._taken[name] = not exists
            if not exists:
                staged = self.folder.folder / STAGING / name
                staged.mkdir()
                for file, data in files.items():
                    (staged / file).write_bytes(data)
            return name
        raise BankError(f"{self.folder.folder / slug} holds other files than the bank's; remove them and save again")

    def _holds(self, files: Mapping[str, bytes]) -> bool:
        with suppress(BankError):
            return all(self.folder.file(path, len(data)) == data for path, data in files.items())
        return False


def replace_bank(
    folder: BankFolder,
    draft: Callable[[Place], Mapping[str, Any]],
    card: Callable[[Mapping[str, Any]], str],
    pictures: Mapping[str, bytes],
) -> None:
    """Replace what a folder holds by another bank: wholly, or not at all.

    Everything is written under names that nothing yet refers to; replacing the manifest is the one step that makes it
    the bank. Files that do not change are left alone. Killed at any moment, the next save tidies up.

    Args:
        folder: Made if missing.
        draft: Puts the bank's files in place, and returns its manifest.
        card: The model card, from the manifest.
        pictures: {path in the folder: content} of the card's pictures; those that are there stay.

    Raises:
        BankError: If the folder holds something else than a bank that can be read, the bank cannot be written down, or
            another process is saving there. The folder's bank is as it was.
    """
    folder.folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder.folder):
        _tidy(folder)
        _refuse_other_content(folder.folder)
        former = folder.manifest() if (folder.folder / MANIFEST).exists() else None
        try:
            (folder.folder / STAGING).mkdir()
            place = Place(folder, former)
            manifest = draft(place)
            sealed = manifests.seal(manifest, folder.folder / MANIFEST)
            persist_tree(folder.folder / STAGING)
            _put_pictures(folder.folder, pictures)
            _commit(folder, sealed, card(manifest), place.moves)
        finally:
            _tidy(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from saving here while the block runs; the lock dies with its holder."""
    path = folder / LOCK
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BankError(f"{folder}: another process is saving there; nothing was written") from error
    except OSError as error:
        raise BankError(f"{path} cannot be locked: {error}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows keeps an open file; it does no harm
            path.unlink()
        lock.release()


def _refuse_other_content(folder: Path) -> None:
    if (folder / CARD).is_dir():
        raise BankError(f"{folder / CARD} is a folder; the model card goes there")
    if os.path.lexists(folder / MANIFEST):
        return
    if any(file.name != LOCK for file in folder.iterdir()):
        raise BankError(f"{folder} is not empty and holds no concept bank; choose another folder")


def _put_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Write the card's pictures, before the card that shows them."""
    if pictures and (folder / ASSETS).is_symlink():
        raise BankError(f"{folder / ASSETS} is a symbolic link; the card's pictures go into a folder there")
    for path, data in pictures.items():
        (folder / path).parent.mkdir(exist_ok=True)
        replace_file(folder / path, data)


def _commit(folder: BankFolder, sealed: bytes, card: str, moves: list[str]) -> None:
    here, staging = folder.folder, folder.folder / STAGING
    # Before the first move, so that whoever tidies up knows what was to come and what was there.
    write_file(staging / MANIFEST, sealed)
    if (here / MANIFEST).exists():
        write_file(staging / FORMER, folder.manifest_bytes())
    write_file(staging / CARD, card.encode())
    persist(staging)
    for name in moves:
        os.replace(staging / name, here / name)
    os.replace(staging / MANIFEST, here / MANIFEST)
    os.replace(staging / CARD, here / CARD)
    persist(here)


def _tidy(folder: BankFolder) -> None:
    """Remove what a finished or interrupted save left: shards and folders that no manifest but its own names."""
    staging = folder.folder / STAGING
    if not os.path.lexists(staging):
        return
    kept = _names(folder.folder)
    if staging.is_symlink():
        staging.unlink()
    for name in (_names(staging, whole=False) | _names(staging, FORMER, whole=False)) - kept:
        _remove(folder.folder / name)
    _remove(staging)


def _names(where: Path, file: str = MANIFEST, whole: bool = True) -> set[str]:
    """List the shards and folders that a manifest names.

    Raises:
        BankError: If it is not valid. One that may be cut short (not `whole`) names none then.
    """
    if not os.path.lexists(where / file):
        return set()
    try:
        return top_names(manifests.parse(BankFolder(where).file(file, manifests.MAX_BYTES), where / file))
    except BankError:
        if whole:
            raise
        return set()


def _remove(path: Path) -> None:
    """Remove a folder or a plain file: what else has the name is not ours (opening a pipe would wait for ever)."""
    if path.is_symlink():
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.is_file():
        with suppress(OSError):  # Windows keeps a file that is mapped; it does no harm
            path.unlink()
