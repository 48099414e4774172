"""Entries: the entries of a bank by name, each in memory or on the disk until it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

from torch import Tensor

from sepme_diffusers.bank.disk.records import Tables, worded
from sepme_diffusers.bank.entry import Entry, Outline
from sepme_diffusers.bank.guard_sets import Guarded
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.encoding import TOKENS


class StoredEntry:
    """An entry on the disk: what the manifest says of it, and its numbers once somebody asks.

    Args:
        record: The concept's record in the manifest.
        tables: What the record refers to.
        guards: The prompts that it leaves alone.
        read: Reads the entry.
        read_bases: Reads the A of its increment by door.
        read_adapter: Reads the files of its adapter by name.
    """

    def __init__(
        self,
        record: Mapping[str, Any],
        tables: Tables,
        guards: Guarded,
        read: Callable[[], Entry],
        read_bases: Callable[[], dict[str, Tensor]],
        read_adapter: Callable[[], dict[str, bytes]],
    ) -> None:
        self.record, self.tables, self.guards = record, tables, guards
        self._read, self._read_bases, self._read_adapter = read, read_bases, read_adapter

    @property
    def entry(self) -> Entry:
        """The entry, read at the first time.

        Raises:
            BankError: If what is stored is not what the manifest says.
        """
        if "_entry" not in vars(self):
            # Of two threads that read at once, both go on with the first one's.
            vars(self).setdefault("_entry", self._read())
        entry: Entry = vars(self)["_entry"]
        return entry

    def adapter_files(self) -> dict[str, bytes]:
        """Read the files of the adapter that the record tells of, by name. Nothing else here needs them.

        Raises:
            BankError: If one is missing, damaged or unsafe.
        """
        return self._read_adapter()

    @property
    def increment(self) -> Increment:
        """The numbers, read at the first time."""
        return self.entry.increment

    @property
    def bases(self) -> Mapping[str, Tensor]:
        """{door: A}. Where the entry has not been read, A alone is, which its digest does not vouch for."""
        return self.entry.bases if "_entry" in vars(self) else self._read_bases()

    @property
    def form(self) -> Literal["text", "module"]:
        """The increment's form."""
        form: Literal["text", "module"] = self.record["form"]
        return form

    @property
    def ranks(self) -> dict[str, int]:
        """{door: r}, the tokens' first."""
        if "rows" not in self.record:
            return {TOKENS: self.record["rank"]}
        ranks = {door: stop - start for door, (start, stop) in self.record["rows"].items()}
        return {TOKENS: ranks.pop(TOKENS)} | ranks

    @property
    def gates(self) -> Mapping[str, float]:
        """{door: gate} of the doors that have one."""
        gates: Mapping[str, float] = self.record.get("gates", {})
        return gates

    @property
    def spellings(self) -> tuple[str, ...]:
        """The names by which a prompt spells the concept."""
        if "_entry" in vars(self):
            return self.entry.spellings
        return worded(self.guards.own, self.tables.wordings[self.record["wording"]]).spellings

    @property
    def metrics(self) -> Mapping[str, Any]:
        """What was measured."""
        metrics: Mapping[str, Any] = self.record["metrics"]
        return metrics

    @property
    def digest(self) -> str:
        """SHA-256 of the increment, see `rows.digest`."""
        digest: str = self.record["digest"]
        return digest

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied and pickled as the entry itself, with its numbers: another process may not have the files."""
        return _itself, (self.entry,)


def _itself(entry: Entry) -> Entry:
    return entry


class Entries(Mapping[str, Entry]):
    """Entries by name, in the order in which increments are added up. Immutable.

    Iterating over the values reads every entry. `outline` says what is known of one without its numbers.

    Args:
        parts: {name: entry, or what stands for it on the disk}.
    """

    def __init__(self, parts: Mapping[str, Entry] | Mapping[str, Entry | StoredEntry]) -> None:
        self._parts: dict[str, Entry | StoredEntry] = dict(parts._parts if isinstance(parts, Entries) else parts)

    def __getitem__(self, name: str) -> Entry:
        part = self._parts[name]
        return part.entry if isinstance(part, StoredEntry) else part

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __contains__(self, name: object) -> bool:
        return name in self._parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and self._parts == other._parts

    __hash__ = None  # type: ignore[assignment]  # a mapping has none

    def outline(self, name: str) -> Outline:
        """Return what is known of an entry without its numbers."""
        return self._parts[name]

    def outlines(self) -> Mapping[str, Outline]:
        """Return what is known of every entry without its numbers."""
        return self._parts

    def stored(self, name: str) -> StoredEntry | None:
        """Return what stands for an entry on the disk; None for one in memory."""
        part = self._parts[name]
        return part if isinstance(part, StoredEntry) else None

    def in_memory(self) -> dict[str, Entry]:
        """Return the entries that no disk holds."""
        return {name: part for name, part in self._parts.items() if isinstance(part, Entry)}

    def joined_by(self, entries: Iterable[Entry]) -> Entries:
        """Add entries, or replace those of the same names."""
        return Entries({**self._parts, **{entry.concept.name: entry for entry in entries}})

    def only(self, names: Iterable[str]) -> Entries:
        """Keep these names, in the present order."""
        kept = set(names)
        return Entries({name: part for name, part in self._parts.items() if name in kept})
