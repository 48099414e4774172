"""Whether a bank's folder is what its manifest says: every fault of its files, none of which is trusted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sepme_diffusers.bank.checks.adapters import AdapterCheck, other_settings
from sepme_diffusers.bank.disk.drafting import lora_files
from sepme_diffusers.bank.disk.folder import BankFolder, hashes
from sepme_diffusers.bank.disk.layout import CARD, LOCK, LORA_CONFIG, LORA_FILE, MANIFEST, SIGNATURE
from sepme_diffusers.bank.disk.manifest import examine
from sepme_diffusers.bank.disk.store import Store
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.bank.errors import BankError, short

_MAX_CONFIG, _MAX_ADAPTER = 2**20, 4 * 2**30
# Beside a bank there may stand what people and repositories need, and no loader reads.
_HARMLESS = {MANIFEST, SIGNATURE, CARD, LOCK, "LICENSE", "LICENSE.md", "LICENSE.txt", ".gitattributes", ".gitignore"}
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif"}
_TOOLS = {".git", ".cache"}


@dataclass(frozen=True)
class Found:
    """What could be read of a bank, and what is wrong with its files.

    Args:
        base: What the increments were made on; None where that cannot be read.
        entries: By concept.
        faults: Of the folder and the manifest.
        by_concept: {concept: faults of its own files}.
        notes: What could not be checked, and why.
        solved_again: Entries whose increments were solved for once more, with what their adapters do in their place.
    """

    base: BaseModel | None
    entries: Mapping[str, Entry] = field(default_factory=dict)
    faults: Sequence[str] = ()
    by_concept: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    solved_again: Mapping[str, Entry] = field(default_factory=dict)


def read_checked(folder: BankFolder, pipe: Any) -> Found:
    """Read what there is to check, and list the faults that are found on the way.

    Args:
        folder: The bank's.
        pipe: The pipeline whose denoiser adapters are compared with; or None.
    """
    try:
        manifest, faults = examine(folder.manifest_bytes())
    except BankError as error:
        return Found(None, faults=[str(error)])
    faults = [f"{folder.folder / MANIFEST}: {fault}" for fault in faults]
    if manifest is None or faults:
        # Without a manifest nothing says what belongs here, and the folder may be a whole disk.
        return Found(None, faults=faults)
    faults += _strays(folder, manifest)
    store, entries = Store(folder, manifest), {}
    by_concept: dict[str, list[str]] = {name: [] for name in manifest["concepts"]}
    unreadable = {shard: _shard_faults(store, shard) for shard in manifest["shards"]}
    faults += [fault for of_shard in unreadable.values() for fault in of_shard]
    check = AdapterCheck(store.base, pipe)
    for name, record in manifest["concepts"].items():
        if unreadable.get(record.get("shard", "")):
            by_concept[name].append(f"its increment is in {record['shard']}, which is damaged")
            continue
        try:
            entries[name] = store.entry(name)
        except BankError as error:
            by_concept[name].append(str(error))
        by_concept[name] += _beside_faults(folder, name, record, entries.get(name), check)
    solved_again = {
        name: replace(entries[name], increment=increment, metrics=_claims(entries[name], manifest["concepts"][name]))
        for name, increment in check.solved_again.items()
    }
    return Found(store.base, entries, faults, by_concept, check.notes, solved_again)


def _claims(entry: Entry, record: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a bank says of an adapter that was solved for once more: how far it moves any guard."""
    return {"leakage": record["adapter"].get("leakage", entry.metrics.get("leakage", 0.0))}


def _shard_faults(store: Store, name: str) -> list[str]:
    try:
        path = store.shard(name).path
    except BankError as error:
        return [str(error)]
    try:
        with safe_open(path, "pt"):
            return []
    except (SafetensorError, OSError) as error:
        return [f"{path} is no safetensors file to other readers: {short(error)}"]


def _strays(folder: BankFolder, manifest: Mapping[str, Any]) -> Iterator[str]:
    """List links, special files, names that some systems take for one, and files that the manifest does not name."""
    named = _HARMLESS | hashes(manifest, adapters=True).keys()
    for where, folders, files in os.walk(folder.folder):
        folders[:] = [name for name in folders if Path(where) != folder.folder or name not in _TOOLS]
        yield from _twins(Path(where), [*folders, *files])
        for path in (Path(where, name) for name in files):
            if fault := _stray(folder, path, named):
                yield fault
        yield from (f"{Path(where, name)} is a symbolic link" for name in folders if Path(where, name).is_symlink())


def _twins(where: Path, names: list[str]) -> Iterator[str]:
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(name.casefold(), []).append(name)
    yield from (f"{where}: some systems take {sorted(same)} for one name" for same in folded.values() if len(same) > 1)


def _stray(folder: BankFolder, path: Path, named: set[str]) -> str | None:
    relative = path.relative_to(folder.folder).as_posix()
    if folder.is_link(path):
        return f"{path} is a symbolic link"
    if not stat.S_ISREG(path.lstat().st_mode):
        return f"{path} is not a plain file"
    if relative in named or path.suffix.lower() in _PICTURES:
        return None
    return f"{path} is not named by the manifest"


def _beside_faults(
    folder: BankFolder, name: str, record: Mapping[str, Any], entry: Entry | None, check: AdapterCheck
) -> Iterator[str]:
    """List what is wrong with the files for other tools, which are never read elsewhere."""
    place = record if "folder" in record else record.get("adapter", {})
    files = {}
    for file, digest in place.get("files", {}).items():
        path = f"{place['folder']}/{file}"
        if file == LORA_FILE and place is record:
            continue  # the increment itself, which has been read
        try:
            folder.hold(path, digest)
            files[file] = folder.file(path, _MAX_CONFIG if file == LORA_CONFIG else _MAX_ADAPTER)
        except BankError as error:
            yield str(error)
    if entry is None or len(files) < len(place.get("files", {})) - (place is record):
        return
    if place is record and (keys := other_settings(files[LORA_CONFIG], lora_files(entry.increment)[LORA_CONFIG])):
        config = folder.folder / place["folder"] / LORA_CONFIG
        yield f"{config} tells other tools something else than the manifest: {keys}"
    if files and place is not record:
        yield from check.faults(name, record, files, entry.increment)
