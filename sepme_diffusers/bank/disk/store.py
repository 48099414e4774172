"""Store: the entries of a bank's folder, each read and checked when somebody asks for its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from sepme_diffusers.bank.disk.folder import BankFolder, sha256
from sepme_diffusers.bank.disk.held import HeldFile
from sepme_diffusers.bank.disk.layout import LORA_CONFIG, LORA_FILE
from sepme_diffusers.bank.disk.records import Shared, Tables, base_from_dict
from sepme_diffusers.bank.disk.shards import ShardFile
from sepme_diffusers.bank.disk.tensor_file import TensorFile
from sepme_diffusers.bank.entries import Entries, StoredEntry
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.bank.errors import BankError, short
from sepme_diffusers.bank.rows import as_rows, digest, from_rows
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.peft_form import base_of_lora, from_lora
from sepme_diffusers.text.encoding import TOKENS

# What a safetensors header takes for the two tensors of a module, generously.
_HEADER = 2048
_MAX_BYTES, _MAX_CONFIG = 4 * 2**30, 2**20
# Files of up to so many bytes are read when a bank is loaded, and so are those beyond the first so many.
_SMALL, _OPEN = 64 * 2**10, 64


class Store:
    """What a folder holds of a bank.

    Args:
        folder: The folder.
        manifest: Its manifest, or the part of it that is wanted; valid.
    """

    def __init__(self, folder: BankFolder, manifest: Mapping[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.base: BaseModel = base_from_dict(manifest["base"])
        self.tables = Tables.of(manifest)
        self.shared = Shared(self.tables)
        self._held: dict[str, HeldFile] = {}
        self._open = 0
        self._shards: dict[str, ShardFile] = {}

    def open(self) -> None:
        """Check every file that the concepts need against its hash, and keep it.

        It stays readable whatever becomes of the folder, so that a bank is whole once it is loaded.

        Raises:
            BankError: If a file is missing, damaged, unsafe, or larger than its shapes allow.
        """
        for shard in self.manifest["shards"]:
            self.shard(shard)
        for record in self.manifest["concepts"].values():
            if "folder" in record:
                self._lora(record)

    def shard(self, name: str) -> ShardFile:
        """Return a shard, checked against its hash.

        Raises:
            BankError: If it is missing, damaged, unsafe, larger than the manifest says, or no safetensors file.
        """
        if name not in self._shards:
            said = self.manifest["shards"][name]
            self._shards[name] = ShardFile(self._hold(name, said["sha256"], said["bytes"]))
        return self._shards[name]

    def _lora(self, record: Mapping[str, Any]) -> HeldFile:
        path = f"{record['folder']}/{LORA_FILE}"
        return self._hold(path, record["files"][LORA_FILE], _largest(record, self.base))

    def _hold(self, path: str, digest: str, most: int) -> HeldFile:
        if path not in self._held:
            in_memory = _SMALL if self._open < _OPEN else most
            self._held[path] = self.folder.hold(path, digest, most, in_memory)
            self._open += self._held[path].size > in_memory
        return self._held[path]

    def entries(self) -> Entries:
        """Return the entries; their numbers are read when somebody asks.

        Raises:
            BankError: If settings or prompts are unusable.
        """
        self._refuse_unusable()
        return Entries(
            {
                name: StoredEntry(
                    record,
                    self.tables,
                    self.shared.guarded(name, record),
                    partial(self.entry, name),
                    partial(self.bases, name),
                    partial(self.adapter_files, name),
                )
                for name, record in self.manifest["concepts"].items()
            }
        )

    def _refuse_unusable(self) -> None:
        """Make everything that many entries share, once."""
        seen: set[tuple[str, str]] = set()
        for name, record in self.manifest["concepts"].items():
            if (shared := (record["wording"], record["config"])) not in seen:
                seen.add(shared)
                self._checked(name, lambda name=name, record=record: self.shared.concept(name, record))
                self._checked(name, lambda record=record: self.shared.config(record))

    def entry(self, name: str) -> Entry:
        """Read a concept's entry.

        Raises:
            BankError: If what is stored is not what the manifest says, or no entry.
        """
        record = self.manifest["concepts"][name]
        increment = self.increment(name)
        concept = self._checked(name, lambda: self.shared.concept(name, record))
        config = self._checked(name, lambda: self.shared.config(record))
        return Entry(concept, increment, config, self.shared.guard_sets[record["guards"]], record["metrics"])

    def increment(self, name: str) -> Increment:
        """Read a concept's increment.

        Raises:
            BankError: If its file is missing, damaged, larger than its shapes allow, or holds no such increment.
        """
        record = self.manifest["concepts"][name]
        increment = self._from_folder(name, record) if "folder" in record else self._from_shard(name, record)
        if wrong := _misfit(increment, record, self.base):
            raise BankError(f"concept {name!r} in {self.folder.folder} does not fit the manifest: {short(wrong)}")
        return increment

    def bases(self, name: str) -> dict[str, Tensor]:
        """Read the A of a concept's increment by door, and nothing else of it. Its digest is not checked.

        Raises:
            BankError: If its file is missing, damaged or larger than its shapes allow, or holds no A.
        """
        record = self.manifest["concepts"][name]
        try:
            if "folder" not in record:
                return self.shard(record["shard"]).bases(record["rows"])
            file = TensorFile(self._lora(record))
            return {TOKENS: file.tensor(base_of_lora(file.names))}
        except (BankError, ValueError) as error:
            raise BankError(f"concept {name!r} in {self.folder.folder}: {short(error)}") from error

    def adapter_files(self, name: str) -> dict[str, bytes]:
        """Read the files of a concept's adapter by name, the weights first.

        Raises:
            BankError: If one is missing, damaged, unsafe, or there is no adapter.
        """
        adapter = self.manifest["concepts"][name].get("adapter")
        if adapter is None:
            raise BankError(f"concept {name!r} in {self.folder.folder} has no adapter")
        files = {}
        for file, most in {LORA_FILE: _MAX_BYTES, LORA_CONFIG: _MAX_CONFIG}.items():
            path = f"{adapter['folder']}/{file}"
            files[file] = self.folder.file(path, most)
            if sha256(files[file]) != adapter["files"][file]:
                raise BankError(f"{self.folder.folder / path} is damaged or was changed")
        return files

    def _from_shard(self, name: str, record: Mapping[str, Any]) -> Increment:
        try:
            rows = self.shard(record["shard"]).rows(record["rows"], record["digest"])
        except BankError as error:
            raise BankError(f"concept {name!r}: {error}") from error
        return self._checked(name, lambda: from_rows(rows, record.get("gates", {})))

    def _from_folder(self, name: str, record: Mapping[str, Any]) -> Increment:
        file = self._lora(record)
        try:
            data = file.read(0, file.size)
        except OSError as error:
            raise BankError(f"concept {name!r}: {file.path} cannot be read: {short(error)}") from error
        try:
            increment = from_lora(load_tensors(data), record.get("gates", {}).get(TOKENS))
            # The file was hashed when it was opened, and may have been changed since: these numbers are used.
            if digest(as_rows(increment)) != record["digest"]:
                raise ValueError("it does not hold the increment that its digest is of")
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            changed = sha256(data) != record["files"][LORA_FILE]
            why = "it was changed (its SHA-256 is not the manifest's)" if changed else short(error)
            raise BankError(f"concept {name!r} in {self.folder.folder}: {file.path} is not valid: {why}") from error
        return increment

    def _checked(self, name: str, make: Any) -> Any:
        try:
            return make()
        except (TypeError, ValueError) as error:
            raise BankError(f"concept {name!r} in {self.folder.folder} is not valid: {short(error)}") from error


def _largest(record: Mapping[str, Any], base: BaseModel) -> int:
    """Count the most bytes that a LoRA of this rank for this base can take, in float64."""
    heights = [d_out for d_out, _ in (base.projections or {}).values()]
    numbers = sum(record["rank"] * (base.width + height) for height in heights)
    return min(8 * numbers + _HEADER * (len(heights) + 1), _MAX_BYTES)


def _misfit(increment: Increment, record: Mapping[str, Any], base: BaseModel) -> str:
    """Say what of an increment is not as the manifest says; empty if all is."""
    misfits = []
    if increment.form != record["form"]:
        misfits.append(f"form {increment.form!r}, not {record['form']!r}")
    if "rank" in record and increment.rank != record["rank"]:
        misfits.append(f"rank {increment.rank}, not {record['rank']}")
    for door, part in {TOKENS: increment, **increment.doors}.items():
        if door not in base.doors or part.A.shape[1] != base.doors[door].width:
            misfits.append(
                f"width {part.A.shape[1]} at the door {door!r}, which the base lacks or has of another width"
            )
    if increment.C is not None:
        heights = {name: d_out for name, (d_out, _) in (base.projections or {}).items()}
        wrong = {name for name, _ in {name: len(c) for name, c in increment.C.items()}.items() ^ heights.items()}
        misfits += [f"other modules or heights than the base's: {sorted(wrong)}"] if wrong else []
    return ", ".join(misfits)
