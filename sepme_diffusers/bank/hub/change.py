"""What a push wants to be different on the Hub, and its union with what others pushed meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from sepme_diffusers.bank.adapters import MOST
from sepme_diffusers.bank.contents import Contents
from sepme_diffusers.bank.disk.drafting import Layout, draft
from sepme_diffusers.bank.disk.layout import MANIFEST
from sepme_diffusers.bank.disk.manifest import parse, seal
from sepme_diffusers.bank.disk.records import TABLES, Tables, base_from_dict, base_to_dict
from sepme_diffusers.bank.entry import Origin
from sepme_diffusers.bank.errors import BankError, PolicyError, PushConflict
from sepme_diffusers.bank.hub.branch import Head, Upload, folders_of
from sepme_diffusers.text.names import some


@dataclass(frozen=True)
class Change:
    """What a push wants to be different on the Hub: concepts that are new or another, and removals.

    Args:
        bank: The bank.
        origin: The repository as the bank's holder last saw it; None for a bank that does not come from there.
        named: See `push_to_hub`, as `remove`.
        remove: See there.
        how: How increments are laid out.
        adapters: See `push_to_hub`.
        changed: The concepts that are not what they were when they were pulled; or those that are named.
    """

    bank: Contents
    origin: Origin | None
    named: tuple[str, ...] | None
    remove: tuple[str, ...]
    how: Layout
    adapters: bool | None
    changed: tuple[str, ...]

    @classmethod
    def of(
        cls,
        bank: Contents,
        origin: Origin | None,
        repository: str,
        named: tuple[str, ...] | None,
        remove: tuple[str, ...],
        how: Layout,
        adapters: bool | None,
    ) -> Change:
        origin = origin if origin and origin.repository == repository else None
        pulled, seen = (origin.outlines, origin.records) if origin else ({}, {})
        bare = {name for name, record in seen.items() if adapters and not folders_of(record)}
        outlines = bank.entries.outlines().items()
        changed = tuple(name for name, outline in outlines if name in bare or pulled.get(name) is not outline)
        names = changed if named is None else named
        if both := sorted(set(names) & set(remove)):
            raise ValueError(f"{both} cannot be both pushed and removed")
        return cls(bank, origin, named, remove, how, adapters, names)

    @property
    def message(self) -> str:
        """The commit's message: the concepts that are pushed and removed."""
        parts = {"Push": self.changed, "Remove": self.remove}
        said = [f"{verb} {_shown(names)}" for verb, names in parts.items() if names]
        return "; ".join(said) or ("Pack the increments" if self.how.pack else "Update the card")

    def refuses_adapter(self, name: str, n_concepts: int) -> bool:
        """Tell whether a concept of a bank of so many shall have no adapter on the Hub."""
        if self.adapters is None:
            return n_concepts > MOST
        return not self.adapters and name in (self.bank.entries if self.named is None else self.named)

    @property
    def relaxed(self) -> set[str]:
        """What the bank's holder has taken out of the policy. A push of some concepts alone does not change it."""
        return set(self.origin.always) - set(self.bank.always) if self.origin and self.named is None else set()

    def expected(self, head: Head) -> dict[str, Any]:
        """Return the records that this change replaces or removes, as its maker last saw them; None for no record.

        What is named is known by being named; for the rest, a bank only knows what it was pulled with.
        """
        seen = self.origin.records if self.origin else head.records
        pulled = self.origin.outlines if self.origin else {}
        known = {*pulled, *(self.named or ()), *self.remove}
        if unknown := [name for name in self.remove if name not in {**seen, **head.records}]:
            raise KeyError(f"cannot remove {unknown}: the bank on the Hub has {some(head.records)}")
        return {name: seen.get(name) if name in known else None for name in (*self.changed, *self.remove)}

    def draft(self, head: Head, upload: Upload) -> dict[str, Any]:
        """Put there what the Hub lacks, and return a manifest of what this change brings, as a reader has it."""
        changed = set(self.changed)
        names = [name for name in self.bank.entries if name in changed or self._is_packed(name, head)]
        manifest = draft(self.bank, upload, self.how, names) | {"policy": {"always": []}}
        file = upload.folder / MANIFEST
        return parse(seal(manifest, file), file)

    def _is_packed(self, name: str, head: Head) -> bool:
        """Tell whether a concept gets another place, because the Hub has it as it was pulled."""
        if not self.how.pack or self.origin is None or self.named is not None or name in self.remove:
            return False
        return name in head.records and _alike(head.records[name], self.origin.records.get(name))

    def origin_after(self, manifest: Mapping[str, Any], drafted: Mapping[str, Any]) -> Origin | None:
        """Return what the bank knows once this is pushed, so that its next push is no conflict with this one.

        None for a bank that does not come from there.
        """
        if self.origin is None:
            return None
        records = {name: record for name, record in self.origin.records.items() if name not in self.remove}
        records |= {name: manifest["concepts"][name] for name in drafted["concepts"]}
        outlines = {name: self.bank.entries.outline(name) for name in drafted["concepts"]}
        always = self.bank.always if self.named is None else self.origin.always
        return replace(self.origin, always=always, records=records, outlines={**self.origin.outlines, **outlines})


def _shown(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def merged(head: Head, change: Change, drafted: Mapping[str, Any], expected: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the manifest that the Hub shall have; the present one itself, if nothing is different."""
    _refuse_conflicts(head, change, drafted["concepts"], expected)
    if head.manifest is None:
        merged = dict(drafted)
    else:
        _refuse_other_base(head.manifest["base"], drafted["base"], _has_per_module(drafted["concepts"]))
        kept = {name: record for name, record in head.records.items() if name not in change.remove}
        merged = {**drafted, "base": _base(head.manifest, drafted, change), "concepts": kept | drafted["concepts"]}
        merged |= _tables(merged["concepts"], head.manifest, drafted)
    merged["concepts"] = _without_refused_adapters(merged["concepts"], change)
    always = [name for name in dict.fromkeys((*head.always, *change.bank.always)) if name not in change.relaxed]
    if missing := [name for name in always if name not in merged["concepts"]]:
        raise PolicyError(f"the bank's policy always erases {missing}; the bank on the Hub would lack them")
    merged["policy"] = {"always": always}
    if head.manifest and all(head.manifest[key] == merged[key] for key in ("base", "policy", "concepts")):
        return head.manifest
    return merged


def _without_refused_adapters(records: Mapping[str, Any], change: Change) -> dict[str, Any]:
    refused = {name for name, r in records.items() if "adapter" in r and change.refuses_adapter(name, len(records))}
    bare = {name: {key: value for key, value in records[name].items() if key != "adapter"} for name in refused}
    return {name: bare.get(name, record) for name, record in records.items()}


def _tables(records: Mapping[str, Any], head: Mapping[str, Any], drafted: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shards and tables that records refer to, of the bank on the Hub and of the change."""
    tables, shards = Tables(), {}
    theirs, mine = Tables.of(head), Tables.of(drafted)
    for name, record in records.items():
        is_mine = name in drafted["concepts"]
        tables.adopt(record, mine if is_mine else theirs)
        if "shard" in record:
            shards[record["shard"]] = (drafted if is_mine else head)["shards"][record["shard"]]
    return {"shards": dict(sorted(shards.items())), **{table: getattr(tables, table) for table in TABLES}}


def _refuse_conflicts(head: Head, change: Change, mine: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    conflicts = [
        name
        for name, record in expected.items()
        if not _alike(head.records.get(name), record) and not _alike(head.records.get(name), mine.get(name))
    ]
    if not conflicts:
        return
    if change.origin is None and change.named is None:
        raise PushConflict(
            f"the Hub has other versions of {conflicts}, and this bank was not pulled from there. Pull it and change "
            "that, or name them in concepts= to replace what the Hub has. Nothing was published"
        )
    raise PushConflict(
        f"{conflicts} changed on the Hub since this push's bank was made or pulled. Pull the bank again and make the "
        "change on that one. Nothing was published"
    )


def _refuse_other_base(theirs: Mapping[str, Any], mine: Mapping[str, Any], per_module: bool) -> None:
    """Check that what is pushed fits the bank on the Hub: text-side increments need the same text encoders alone."""
    there, here = base_from_dict(theirs).fingerprint, base_from_dict(mine).fingerprint
    if reason := there.differs(here) if per_module else there.text_side.differs(here):
        raise BankError(
            f"the bank on the Hub is for {theirs['name']!r} and this one for {mine['name']!r}, another base "
            f"({reason}); push it to a repository of its own"
        )


def _base(head: Mapping[str, Any], drafted: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Name the base for the bank on the Hub: as the push does, or as it is there if only some are pushed.

    What one of the two does not know, the other may. Per-module increments on the Hub keep the base that they are of.
    """
    mine, theirs = base_from_dict(drafted["base"]), base_from_dict(head["base"])
    keep = change.named is not None or _has_per_module(head["concepts"])
    return base_to_dict(theirs.completed_by(mine) if keep else mine.completed_by(theirs))


def _has_per_module(records: Mapping[str, Any]) -> bool:
    return any(record["form"] == "module" for record in records.values())


# Where a record says that its files are, and what is derived from the increment for other tools.
_ASIDE = ("shard", "rows", "folder", "adapter")


def _alike(record: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Tell whether two records say the same of an erasure, wherever its files are."""
    if record is None or other is None:
        return record is other
    first, second = ({k: v for k, v in each.items() if k not in _ASIDE} for each in (record, other))
    return first == second
