"""A bank's files, drawn up for a folder or for the Hub: what is there already is used again."""

from __future__ import annotations

import logging
import platform
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch

from sepme_diffusers.bank.adapters import Adapters
from sepme_diffusers.bank.card import Picture, model_card
from sepme_diffusers.bank.contents import Contents
from sepme_diffusers.bank.disk.folder import BankFolder, in_folder, sha256
from sepme_diffusers.bank.disk.layout import CARD
from sepme_diffusers.bank.disk.records import TABLES, Tables, base_to_dict, stated_metrics
from sepme_diffusers.bank.disk.saving import replace_bank
from sepme_diffusers.bank.disk.shards import Rows, shards_of
from sepme_diffusers.bank.entry import Outline
from sepme_diffusers.bank.errors import BankError
from sepme_diffusers.bank.rows import as_rows, digest
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.peft_form import peft_files, to_lora
from sepme_diffusers.text.spelling import slug

logger = logging.getLogger(__name__)  # see adapters.py

# Where a record says its increment is.
_LOCATION = ("shard", "rows", "folder", "files", "rank")
# A record's keys in the order in which they are written, so that saving again changes no byte.
_RECORD = ("form", "digest", *_LOCATION, "adapter", "gates", "wording", "guards", "config", "metrics")


@dataclass(frozen=True)
class Layout:
    """How a bank is laid out on the disk.

    Args:
        dtype: Of B or C; None leaves every number as it is.
        pack: Write all shards anew, instead of adding one to those that are there.
        adapters: Whether there are adapters beside increments that are no LoRA. One that is there, or where the bank
            was loaded from, is kept while its increment is the same.
        maker: Makes the adapters that are not there, or are of another base. Default: they are left out.
    """

    dtype: torch.dtype | None = None
    pack: bool = False
    adapters: bool = True
    maker: Adapters | None = None


def write(
    contents: Contents,
    folder: Path,
    how: Layout | None = None,
    license: str | None = None,
    pictures: Iterable[Picture] = (),
) -> None:
    """Write a bank into a folder; see `ConceptBank.save_pretrained`.

    Args:
        contents: What to write.
        folder: See there.
        how: Precision, shards and adapters. Default: numbers as they are, and adapters that are there.
        license: See there.
        pictures: See there.

    Raises:
        BankError: See there.
    """
    pictures = tuple(pictures)
    previous = (folder / CARD).read_text("utf-8", errors="replace") if (folder / CARD).is_file() else None
    replace_bank(
        BankFolder(folder),
        lambda place: draft(contents, place, how or Layout()),
        lambda manifest: model_card(manifest, None, license, pictures, previous),
        {picture.path: picture.png() for picture in pictures},
    )


class Target(Protocol):
    """Where a bank's files go."""

    @property
    def former(self) -> Mapping[str, Any] | None:
        """The manifest of the bank that is there."""
        ...

    def keep(self, name: str, files: Mapping[str, str]) -> bool:
        """Go on using a shard or folder with these files, {path: SHA-256}, if they are there; tell if they are."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Put a file there, whose name says its content."""
        ...

    def put_folder(self, slug: str, concept: str, files: Mapping[str, bytes]) -> str:
        """Put a concept's folder there, and return its name: the slug, perhaps with digits behind it."""
        ...


def draft(contents: Contents, place: Target, how: Layout, names: Collection[str] | None = None) -> dict[str, Any]:
    """Put a bank's files in place, but for those that are there already, and return its manifest, not sealed.

    Args:
        contents: The bank.
        place: Where the files go.
        how: See `Layout`.
        names: Concepts: then these alone are put there, and are in the manifest. Default: all.

    Raises:
        BankError: If a number is too large for the precision, or an increment cannot be read.
    """
    return _Draft(contents, place, how).manifest(contents.entries if names is None else names)


class _Draft:
    """A bank on its way to where it is kept."""

    def __init__(self, contents: Contents, place: Target, how: Layout) -> None:
        self._contents, self._place, self._how = contents, place, how
        self._former: Mapping[str, Any] = place.former or {"concepts": {}, "shards": {}}
        self._tables = Tables()
        self._records: dict[str, dict[str, Any]] = {}
        self._shards: dict[str, dict[str, Any]] = {}
        self._without: dict[str, str] = {}

    def manifest(self, names: Collection[str]) -> dict[str, Any]:
        """Put the files of these concepts in place, and return the manifest."""
        entries, waiting = self._contents.entries, []
        # Of all concepts, whichever are put there: what is said of one does not depend on what goes along.
        metrics = stated_metrics(entries.outlines())
        for name in names:
            outline, stored = entries.outline(name), entries.stored(name)
            shared = (
                self._tables.adopt(stored.record, stored.tables)
                if stored is not None
                else self._tables.add(entries[name])
            )
            location, rows = self._located(name, outline)
            gates = {"gates": dict(outline.gates)} if outline.gates else {}
            self._records[name] = {"form": outline.form, **location, **gates, **shared, "metrics": metrics[name]}
            self._records[name] |= self._adapter(name, location)
            waiting += [] if rows is None else [(name, rows)]
        for shard in shards_of(waiting):
            self._place.put(shard.name, shard.data)
            self._shards[shard.name] = {"sha256": shard.sha256, "bytes": len(shard.data)}
            for name, places in shard.places.items():
                rows_of = {door: list(place) for door, place in places.items()}
                self._records[name] |= {"shard": shard.name, "rows": rows_of}
        if self._without:
            logger.warning("these concepts have no adapter for PEFT: %s", self._without)
        return {
            "libraries": libraries(),
            "base": base_to_dict(self._contents.base),
            "policy": {"always": list(self._contents.always)},
            "shards": dict(sorted(self._shards.items())),
            **{table: getattr(self._tables, table) for table in TABLES},
            "concepts": {
                name: {key: record[key] for key in _RECORD if key in record} for name, record in self._records.items()
            },
        }

    def _located(self, name: str, outline: Outline) -> tuple[dict[str, Any], Rows | None]:
        """Say where an increment is, as its record does; or give its rows, which a new shard has to hold."""
        increment = None if self._how.dtype is None else self._as_stored(name, outline)
        wanted = outline.digest if increment is None else digest(as_rows(increment))
        if (kept := self._kept(name, wanted)) is not None:
            return kept, None
        increment = increment or outline.increment
        if not is_lora(increment):
            # Now, so that a record's keys have one order whether its rows are put into a shard or are there already.
            return {"digest": wanted, "shard": "", "rows": {}}, as_rows(increment)
        files = lora_files(increment)
        folder = self._place.put_folder(slug(name), name, files)
        hashed = {file: sha256(data) for file, data in files.items()}
        return {"digest": wanted, "folder": folder, "files": hashed, "rank": increment.rank}, None

    def _as_stored(self, name: str, outline: Outline) -> Increment:
        if self._how.dtype is None:
            return outline.increment
        try:
            return as_stored(outline.increment, self._how.dtype)
        except ValueError as error:
            raise BankError(f"concept {name!r} cannot be saved as {self._how.dtype}: {error}") from error

    def _kept(self, name: str, wanted: str) -> dict[str, Any] | None:
        """Where the folder has the increment already, undamaged; None if it has not, or shards are packed anew."""
        former = self._former["concepts"].get(name)
        if former is None or former["digest"] != wanted or ("shard" in former and self._how.pack):
            return None
        if "shard" in former:
            shard = {former["shard"]: self._former["shards"][former["shard"]]}
            if not self._place.keep(former["shard"], {name: said["sha256"] for name, said in shard.items()}):
                return None
            self._shards |= shard
        elif not self._place.keep(former["folder"], in_folder(former)):
            return None
        return {"digest": wanted} | {key: former[key] for key in _LOCATION if key in former}

    def _adapter(self, name: str, location: Mapping[str, Any]) -> dict[str, Any]:
        """Keep, copy or make the adapter that other tools read; see `Layout`."""
        if not self._how.adapters or "folder" in location:
            return {}
        if (kept := self._kept_adapter(name, location["digest"])) is not None:
            return {"adapter": kept}
        found = self._copied_adapter(name, location["digest"]) or self._made_adapter(name)
        if found is None:
            return {}
        files, said = found
        folder = self._place.put_folder(slug(name), name, files)
        return {"adapter": {"folder": folder, "files": {f: sha256(data) for f, data in files.items()}, **said}}

    def _kept_adapter(self, name: str, wanted: str) -> dict[str, Any] | None:
        """The adapter that the folder has already."""
        former = self._former["concepts"].get(name, {})
        if not self._serves(name, wanted, former):
            return None
        adapter: dict[str, Any] = former["adapter"]
        return adapter if self._place.keep(adapter["folder"], in_folder(adapter)) else None

    def _copied_adapter(self, name: str, wanted: str) -> tuple[dict[str, bytes], dict[str, Any]] | None:
        """The adapter that is where the entry was loaded from, with what its record says."""
        stored = self._contents.entries.stored(name)
        if stored is None or not self._serves(name, wanted, stored.record):
            return None
        try:
            files = stored.adapter_files()
        except BankError as error:
            logger.info("the adapter of %r is not copied: %s", name, error)
            return None
        said = stored.record["adapter"]
        return files, {key: value for key, value in said.items() if key not in ("folder", "files")}

    def _serves(self, name: str, wanted: str, record: Mapping[str, Any]) -> bool:
        """Tell whether a record has an adapter of the increment that is being written, for the wanted base."""
        if "adapter" not in record or record["digest"] != wanted:
            return False
        maker, made = self._how.maker, self._contents.entries.in_memory().get(name)
        if maker is not None and maker.name != record["adapter"]["base"]:
            return False
        return made is None or made.adapter is None or digest(as_rows(made.adapter)) == record["adapter"]["of"]

    def _made_adapter(self, name: str) -> tuple[dict[str, bytes], dict[str, Any]] | None:
        if self._how.maker is None:
            return None
        entries = self._contents.entries
        try:
            return self._how.maker.adapter(entries[name], self._as_stored(name, entries.outline(name)))
        except ValueError as error:
            self._without[name] = str(error)
            return None


def libraries() -> dict[str, str]:
    """List the versions of what made a bank."""
    names = ("sepme_diffusers", "torch", "diffusers", "transformers", "peft", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def is_lora(increment: Increment) -> bool:
    """Tell whether an increment is stored as a PEFT LoRA.

    A compact one is not: a LoRA holds A once per module. Neither is one that acts at further doors: whoever loads
    LoRAs would take a part of it for the whole.
    """
    return increment.form == "module" and not increment.is_compact and not increment.doors


def lora_files(increment: Increment) -> dict[str, bytes]:
    """Make the files of a per-module increment's folder: a PEFT LoRA and its config."""
    return peft_files(*to_lora(increment))


def as_stored(increment: Increment, dtype: torch.dtype) -> Increment:
    """Cast B or C. A becomes float32, because it carries the separability; a compact increment stays as it is.

    Raises:
        ValueError: If a number is too large for the dtype.
    """
    doors = {name: as_stored(part, dtype) for name, part in increment.doors.items()}
    if increment.is_compact:
        return replace(increment, doors=doors)
    b = None if increment.B is None else increment.B.to(dtype)
    c = None if increment.C is None else {name: tensor.to(dtype) for name, tensor in increment.C.items()}
    return replace(increment, A=increment.A.float(), B=b, C=c, doors=doors)
