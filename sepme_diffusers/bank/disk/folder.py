"""A bank's folder: its files, read without trusting them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from sepme_diffusers.bank.disk import manifest as manifests
from sepme_diffusers.bank.disk.held import HeldFile
from sepme_diffusers.bank.disk.layout import LORA_FILE, MANIFEST
from sepme_diffusers.bank.errors import BankError

_MAX_BYTES = 4 * 2**30


class BankFolder:
    """A bank's folder; the manifest alone says what belongs to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def manifest(self, wanted: Sequence[str] | None = None, data: bytes | None = None) -> dict[str, Any]:
        """Read the manifest, with no concepts but the wanted ones.

        Args:
            wanted: Names, or None for all.
            data: The manifest's bytes, where they have been read already. Default: as it stands there.

        Raises:
            BankError: If it is missing, damaged, unsafe or of a newer format.
            KeyError: If it lacks one of the wanted.
            PolicyError: If `wanted` leaves out a concept that the policy always erases.
        """
        return manifests.parse(self.manifest_bytes() if data is None else data, self.folder / MANIFEST, wanted)

    def manifest_bytes(self) -> bytes:
        """Read the manifest's bytes.

        Raises:
            BankError: If there is none, or it is no plain file of a sensible size.
        """
        if not os.path.lexists(self.folder / MANIFEST):
            raise BankError(f"{self.folder} is no concept bank: it has no {MANIFEST}")
        return self.file(MANIFEST, manifests.MAX_BYTES)

    def damaged(self, wanted: Sequence[str] | None = None) -> list[str]:
        """List the files that are not what their hashes say: the manifest, or else those of the wanted concepts."""
        try:
            data = self.manifest_bytes()
        except BankError:
            return [MANIFEST]
        if manifests.is_damaged(data):
            return [MANIFEST]
        try:
            manifest = self.manifest(wanted, data)
        except BankError:
            return []
        return [path for path, digest in hashes(manifest).items() if not self.holds(path, digest)]

    def hold(self, path: str, digest: str, most: int = _MAX_BYTES, in_memory: int = 0) -> HeldFile:
        """Check a file against its hash, and keep it readable whatever becomes of it.

        Args:
            path: In the folder, with "/".
            digest: Its SHA-256.
            most: The most bytes that it may have.
            in_memory: Up to this many bytes it is read; else it stays open.

        Raises:
            BankError: See `file`; or if it is not what its hash says.
        """
        file = self.path(path, most)
        try:
            held = HeldFile.opened(file)
            held = held.in_memory() if held.size <= in_memory else held
            found = held.sha256()
        except OSError as error:
            raise BankError(f"{file} cannot be read: {error}") from error
        if found != digest:
            raise BankError(f"{file} is damaged or was changed (its SHA-256 is not the manifest's)")
        return held

    def holds(self, path: str, digest: str) -> bool:
        """Tell whether a file is there and is what its hash says."""
        with suppress(BankError):
            self.hold(path, digest)
            return True
        return False

    def file(self, path: str, most: int) -> bytes:
        """Read a file of this folder.

        Args:
            path: In the folder, with "/".
            most: The most bytes that it may have; a larger one is not read.

        Raises:
            BankError: If it is missing, a link, no plain file, larger, or outside of the folder.
        """
        file = self.path(path, most)
        try:
            with file.open("rb") as stream:
                data = stream.read(most + 1)
        except OSError as error:
            raise BankError(f"{file} cannot be read: {error}") from error
        if len(data) > most:
            raise BankError(f"{file} has more than {most} bytes, which is all that the manifest says")
        return data

    def path(self, path: str, most: int) -> Path:
        """Return where a file of this folder is, if it may be read; see `file`.

        Raises:
            BankError: See `file`.
        """
        file, parts = self.folder / path, PurePosixPath(path).parts
        if ".." in parts or PurePosixPath(path).is_absolute() or "\\" in path or not path.isprintable():
            raise BankError(f"{path!r} is not a file of {self.folder}")
        try:
            if self.is_link(file):
                raise BankError(f"{file} is a symbolic link; a bank's files are plain files")
            status = file.stat()
        except FileNotFoundError as error:
            raise BankError(f"{file} is missing") from error
        except OSError as error:
            raise BankError(f"{file} cannot be read: {error}") from error
        if not stat.S_ISREG(status.st_mode):
            raise BankError(f"{file} is not a plain file")
        if status.st_size > most:
            raise BankError(f"{file} has {status.st_size} bytes; what the manifest says needs at most {most}")
        return file

    def is_link(self, file: Path) -> bool:
        """Tell whether the file or its folder is a link, huggingface_hub's own to its blobs excepted."""
        steps = [file, *file.parents][: len(file.relative_to(self.folder).parts)]
        if not any(step.is_symlink() for step in steps):
            return False
        here, target = (Path(os.path.realpath(path)) for path in (self.folder, file))
        blobs = [parent.parent / "blobs" for parent in here.parents if parent.name == "snapshots"]
        return any(step.is_symlink() for step in steps[1:]) or target.parent not in blobs


def hashes(manifest: Mapping[str, Any], adapters: bool = False) -> dict[str, str]:
    """Return the SHA-256 of each file that a manifest's concepts need, by path.

    Args:
        manifest: A valid one.
        adapters: Also of the adapters that are derived for other tools, which no loader of this package needs.
    """
    needed = {name: shard["sha256"] for name, shard in manifest["shards"].items()}
    for record in manifest["concepts"].values():
        if "folder" in record:
            files = in_folder(record)
            lora = f"{record['folder']}/{LORA_FILE}"
            needed |= files if adapters else {lora: files[lora]}
        if adapters and "adapter" in record:
            needed |= in_folder(record["adapter"])
    return needed


def in_folder(place: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each file of a concept's folder, by path.

    Args:
        place: What a manifest says of it: `folder` and `files`.
    """
    return {f"{place['folder']}/{file}": sha for file, sha in place["files"].items()}


def top_names(manifest: Mapping[str, Any]) -> set[str]:
    """Return the names of the shards and folders that belong to a bank."""
    records = manifest["concepts"].values()
    adapters = [record["adapter"] for record in records if "adapter" in record]
    return set(manifest["shards"]) | {place["folder"] for place in (*records, *adapters) if "folder" in place}


def sha256(data: bytes) -> str:
    """Hash bytes: SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()
