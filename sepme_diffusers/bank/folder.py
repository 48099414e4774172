"""A bank's folder: its files, read without trusting them and written wholly or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from sepme_diffusers.bank import manifest as manifests
from sepme_diffusers.bank.errors import BankError, PolicyError
from sepme_diffusers.bank.files import persist, persist_tree, replace_file, write_file
from sepme_diffusers.bank.layout import (
    ASSETS,
    CARD,
    FORMER,
    LOCK,
    LORA_CONFIG,
    LORA_FILE,
    MANIFEST,
    MODULE_FILE,
    STAGING,
    TEXT_FILE,
)
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.peft_form import from_lora, to_lora

# What a safetensors header takes for the two tensors of a module, generously.
_HEADER = 2048
_MAX_BYTES = 4 * 2**30


@dataclass(frozen=True)
class ConceptFiles:
    """A concept as it is written.

    Args:
        name: The concept's name.
        slug: The folder that it goes to, if that is free.
        files: {file name: content}, the weights first.
        record: Its record in the manifest, but for what the folder adds: `file`, `sha256` and `beside`.
    """

    name: str
    slug: str
    files: Mapping[str, bytes]
    record: Mapping[str, Any]


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
        manifest = manifests.parse(self.manifest_bytes() if data is None else data, self.folder / MANIFEST)
        if wanted is None:
            return manifest
        concepts, always = manifest["concepts"], manifest["policy"]["always"]
        if unknown := [name for name in wanted if name not in concepts]:
            raise KeyError(f"no concepts {unknown} in this bank; it has {list(concepts)}")
        if left_out := sorted(set(always) - set(wanted)):
            raise PolicyError(f"the bank's policy always erases {left_out}; load them as well")
        return {**manifest, "concepts": {name: record for name, record in concepts.items() if name in wanted}}

    def manifest_bytes(self) -> bytes:
        """Read the manifest's bytes.

        Raises:
            BankError: If there is none, or it is no plain file of a sensible size.
        """
        if not os.path.lexists(self.folder / MANIFEST):
            raise BankError(f"{self.folder} is no concept bank: it has no {MANIFEST}")
        return self.file(MANIFEST, manifests.MAX_BYTES)

    def increment(self, name: str, record: Mapping[str, Any], base: Mapping[str, Any]) -> Increment:
        """Read a concept's increment.

        Args:
            name: The concept's name.
            record: Its record in the manifest.
            base: The manifest's `base`, whose shapes the increment must have.

        Raises:
            BankError: If its file is missing, damaged, larger than its shapes allow, or holds no such increment.
        """
        file, data = self.folder / record["file"], self.file(record["file"], _largest(record, base))
        if sha256(data) != record["sha256"]:
            raise BankError(f"concept {name!r}: {file} is damaged or was changed (its SHA-256 is not the manifest's)")
        try:
            increment = _increment(file.name, load_tensors(data), record)
        except (SafetensorError, TypeError, ValueError, KeyError, RuntimeError, OverflowError) as error:
            raise BankError(f"concept {name!r}: {file} holds no increment: {error}") from error
        if wrong := _misfit(increment, record, base):
            raise BankError(f"concept {name!r}: {file} does not fit the manifest: {wrong}")
        return increment

    def damaged(self, wanted: Sequence[str] | None = None) -> list[str]:
        """List the files that are not what their hashes say: the manifest, or else those of the wanted concepts."""
        try:
            data = self.manifest_bytes()
        except BankError:
            return [MANIFEST]
        if manifests.is_damaged(data):
            return [MANIFEST]
        try:
            records = self.manifest(wanted, data)["concepts"].values()
        except BankError:
            return []
        hashes = {record["file"]: record["sha256"] for record in records}
        return [path for path, digest in hashes.items() if self._hash(path) != digest]

    def _hash(self, path: str) -> str | None:
        with suppress(BankError):
            return sha256(self.file(path, _MAX_BYTES))
        return None

    def file(self, path: str, most: int) -> bytes:
        """Read a file of this folder.

        Args:
            path: In the folder, with "/".
            most: The most bytes that it may have; a larger one is not read.

        Raises:
            BankError: If it is missing, a link, no plain file, larger, or outside of the folder.
        """
        file, parts = self.folder / path, PurePosixPath(path).parts
        if ".." in parts or PurePosixPath(path).is_absolute() or "\\" in path or not path.isprintable():
            raise BankError(f"{path!r} is not a file of {self.folder}")
        try:
            if self.is_link(file):
                raise BankError(f"{file} is a symbolic link; a bank's files are plain files")
            status = file.stat()
            if not stat.S_ISREG(status.st_mode):
                raise BankError(f"{file} is not a plain file")
            if status.st_size > most:
                raise BankError(f"{file} has {status.st_size} bytes; what the manifest says needs at most {most}")
            return file.read_bytes()
        except FileNotFoundError as error:
            raise BankError(f"{file} is missing") from error
        except OSError as error:
            raise BankError(f"{file} cannot be read: {error}") from error

    def is_link(self, file: Path) -> bool:
        """Tell whether the file or its folder is a link, huggingface_hub's own to its blobs excepted."""
        steps = [file, *file.parents][: len(file.relative_to(self.folder).parts)]
        if not any(step.is_symlink() for step in steps):
            return False
        here, target = (Path(os.path.realpath(path)) for path in (self.folder, file))
        blobs = [parent.parent / "blobs" for parent in here.parents if parent.name == "snapshots"]
        return any(step.is_symlink() for step in steps[1:]) or target.parent not in blobs

    def write(
        self,
        head: Mapping[str, Any],
        concepts: Iterable[ConceptFiles],
        card: Callable[[Mapping[str, Any]], str],
        pictures: Mapping[str, bytes],
    ) -> None:
        """Replace what the folder holds by this bank: wholly, or not at all.

        Everything is written under names that nothing yet refers to; replacing the manifest is the one step that makes
        it the bank. Files that do not change are left alone. Killed at any moment, the next save tidies up.

        Args:
            head: The manifest but for its concepts.
            concepts: What to write, in the bank's order.
            card: The model card, from the manifest.
            pictures: {path in the folder: content} of the card's pictures; those that are there stay.

        Raises:
            BankError: If the folder holds something else than a bank that can be read, the bank cannot be written
                down, or another process is saving there. The folder's bank is as it was.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._tidy()
            self._refuse_other_content()
            try:
                records, moves = self._stage(concepts)
                manifest = {**head, "concepts": records}
                sealed = manifests.seal(manifest, self.folder / MANIFEST)
                self._put(pictures)
                self._commit(sealed, card(manifest), moves)
            finally:
                self._tidy()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from saving here while the block runs; the lock dies with its holder."""
        path = self.folder / LOCK
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise BankError(f"{self.folder}: another process is saving there; nothing was written") from error
        except OSError as error:
            raise BankError(f"{path} cannot be locked: {error}") from error
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps an open file; it does no harm
                path.unlink()
            lock.release()

    def _refuse_other_content(self) -> None:
        if (self.folder / CARD).is_dir():
            raise BankError(f"{self.folder / CARD} is a folder; the model card goes there")
        if os.path.lexists(self.folder / MANIFEST):
            return
        if any(file.name != LOCK for file in self.folder.iterdir()):
            raise BankError(f"{self.folder} is not empty and holds no concept bank; choose another folder")

    def _stage(self, concepts: Iterable[ConceptFiles]) -> tuple[dict[str, Any], list[str]]:
        """Write the files of new or changed concepts aside; the records of all, and the folders to move."""
        (self.folder / STAGING).mkdir()
        records: dict[str, Any] = {}
        taken = {ASSETS: True}
        for concept in concepts:
            target, there = self._target(concept, taken)
            taken[target] = there
            if not there:
                _write_folder(self.folder / STAGING / target, concept.files)
            weights, *others = concept.files
            records[concept.name] = {
                "file": f"{target}/{weights}",
                "sha256": sha256(concept.files[weights]),
                "beside": {file: sha256(concept.files[file]) for file in others},
                **concept.record,
            }
        persist_tree(self.folder / STAGING)
        return records, [target for target, there in taken.items() if not there]

    def _target(self, concept: ConceptFiles, taken: Mapping[str, bool]) -> tuple[str, bool]:
        """Choose the concept's folder: its slug, with a hash where that is other content. And whether it is there."""
        other = sha256(b"\0".join([concept.name.encode(), *concept.files.values()]))[:12]
        for name in (concept.slug, f"{concept.slug}-{other}"):
            exists = os.path.lexists(self.folder / name)
            if name not in taken and (not exists or self._holds(name, concept.files)):
                return name, exists
        raise BankError(f"{self.folder / concept.slug} holds other files than the bank's; remove them and save again")

    def _holds(self, target: str, files: Mapping[str, bytes]) -> bool:
        with suppress(BankError):
            return all(self.file(f"{target}/{name}", len(data)) == data for name, data in files.items())
        return False

    def _put(self, pictures: Mapping[str, bytes]) -> None:
        """Write the card's pictures, before the card that shows them."""
        if pictures and (self.folder / ASSETS).is_symlink():
            raise BankError(f"{self.folder / ASSETS} is a symbolic link; the card's pictures go into a folder there")
        for path, data in pictures.items():
            (self.folder / path).parent.mkdir(exist_ok=True)
            replace_file(self.folder / path, data)

    def _commit(self, sealed: bytes, card: str, moves: Iterable[str]) -> None:
        staging = self.folder / STAGING
        # Before the first move, so that whoever tidies up knows what was to come and what was there.
        write_file(staging / MANIFEST, sealed)
        if (self.folder / MANIFEST).exists():
            write_file(staging / FORMER, self.manifest_bytes())
        write_file(staging / CARD, card.encode())
        persist(staging)
        for target in moves:
            os.replace(staging / target, self.folder / target)
        os.replace(staging / MANIFEST, self.folder / MANIFEST)
        os.replace(staging / CARD, self.folder / CARD)
        persist(self.folder)

    def _tidy(self) -> None:
        """Remove what a finished or interrupted save left: the concepts that no manifest but its own names."""
        staging = self.folder / STAGING
        kept = self._folders(self.folder)
        if staging.is_symlink():
            staging.unlink()
        for folder in (self._folders(staging) | self._folders(staging, FORMER)) - kept:
            _remove(self.folder / folder)
        _remove(staging)

    def _folders(self, where: Path, file: str = MANIFEST) -> set[str]:
        """List the concepts' folders that a manifest names.

        Raises:
            BankError: If the bank's own manifest is not valid. A staged one may be cut short: then it names none.
        """
        if not os.path.lexists(where / file):
            return set()
        try:
            data = BankFolder(where).file(file, manifests.MAX_BYTES)
            manifest = manifests.parse(data, where / file)
        except BankError:
            if where == self.folder:
                raise
            return set()
        return {record["file"].split("/")[0] for record in manifest["concepts"].values()}


def increment_files(increment: Increment, dtype: torch.dtype | None = None) -> dict[str, bytes]:
    """Make the files of a concept's folder, the weights first.

    Args:
        increment: What they hold.
        dtype: Of B or C; None leaves each as it is. A is written in float32: it carries the separability. A compact
            increment stays as it is altogether.

    Raises:
        ValueError: If a number is too large for the dtype.
    """
    stored = _as_stored(increment, dtype)
    if stored.form == "text":
        return {TEXT_FILE: _safetensors(stored.tensors())}
    # Not as a LoRA: whoever loads LoRAs would take a part of the increment for the whole.
    if stored.is_compact or stored.doors:
        return {MODULE_FILE: _safetensors(stored.tensors())}
    tensors, config = to_lora(stored)
    settings = {key: value for key, value in config.to_dict().items() if value is not None}
    settings["target_modules"] = sorted(settings["target_modules"])
    plain = json.dumps(settings, indent=2, sort_keys=True, default=str).encode()
    return {LORA_FILE: _safetensors(tensors), LORA_CONFIG: plain}


def _as_stored(increment: Increment, dtype: torch.dtype | None) -> Increment:
    doors = {name: _as_stored(part, dtype) for name, part in increment.doors.items()}
    if increment.is_compact:
        return replace(increment, doors=doors)
    b, c = increment.B, increment.C
    b = None if b is None else b.to(dtype or b.dtype)
    c = None if c is None else {name: tensor.to(dtype or tensor.dtype) for name, tensor in c.items()}
    return replace(increment, A=increment.A.float(), B=b, C=c, doors=doors)


def _increment(file: str, tensors: dict[str, Tensor], record: Mapping[str, Any]) -> Increment:
    """Make the increment that a file of this name holds."""
    further = {} if file == LORA_FILE else _taken_out(tensors)
    gates = dict.fromkeys(further) | record.get("gates", {})
    if unknown := sorted(gates.keys() - further.keys()):
        raise ValueError(f"the manifest has gates for further doors {unknown}, which it lacks")
    doors = {door: _text_side(factors, gates[door]) for door, factors in further.items()}
    gate = record.get("gate")
    if file == LORA_FILE:
        return from_lora(tensors, gate)
    if record["form"] == "text":
        return _text_side(tensors, gate, doors)
    return Increment(tensors.pop("A"), C=tensors, gate=gate, doors=doors)


def _taken_out(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Take the tensors "<door>.A" and "<door>.B" of further doors out of an increment's: {door: {factor: tensor}}."""
    further: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in tensors if key.endswith((".A", ".B"))]:
        door, _, factor = key.rpartition(".")
        further.setdefault(door, {})[factor] = tensors.pop(key)
    return further


def _text_side(
    factors: Mapping[str, Tensor], gate: float | None, doors: Mapping[str, Increment] | None = None
) -> Increment:
    if factors.keys() != {"A", "B"}:
        raise ValueError(f"a text-side increment has the tensors A and B, not {sorted(factors)}")
    return Increment(factors["A"], B=factors["B"], gate=gate, doors=doors or {})


def sha256(data: bytes) -> str:
    """Hash bytes: SHA-256, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _largest(record: Mapping[str, Any], base: Mapping[str, Any]) -> int:
    """Count the most bytes that an increment of this rank for this base can take, in float64."""
    rank, width = record["rank"], base["width"]
    heights = [width] if record["form"] == "text" else [d_out for d_out, _ in base["projections"].values()]
    numbers = sum(rank * (width + height) for height in heights)
    # What is done at a further door has a rank of its own.
    doors = sum(8 * 2 * width**2 + _HEADER for width in base.get("doors", {}).values())
    return min(8 * numbers + _HEADER * (len(heights) + 1) + doors, _MAX_BYTES)


def _misfit(increment: Increment, record: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Say what of an increment is not as the manifest says; empty if all is."""
    misfits = []
    if increment.rank != record["rank"]:
        misfits.append(f"rank {increment.rank}, not {record['rank']}")
    if increment.A.shape[1] != base["width"]:
        misfits.append(f"width {increment.A.shape[1]}, not {base['width']}")
    if increment.C is not None:
        heights = {name: d_out for name, (d_out, _) in base["projections"].items()}
        wrong = {name for name, _ in {name: len(c) for name, c in increment.C.items()}.items() ^ heights.items()}
        misfits += [f"other modules or heights than the base's: {sorted(wrong)}"] if wrong else []
    doors, known = {name: part.A.shape[1] for name, part in increment.doors.items()}, base.get("doors", {})
    if other := sorted(name for name, width in doors.items() if known.get(name) != width):
        misfits.append(f"further doors that the base lacks, or has of other widths: {other}")
    return ", ".join(misfits)


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return save_tensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"}
    )


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a new folder; `persist_tree` makes it survive a loss of power."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _remove(folder: Path) -> None:
    """Remove a folder, if it is one: what else has the name is not ours (and opening a pipe would wait for ever)."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder, ignore_errors=True)
