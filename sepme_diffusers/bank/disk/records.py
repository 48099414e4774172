"""What a manifest says of entries: a record for each, and tables of what many of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from sepme_diffusers.bank.entry import BaseModel, Entry, Outline
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.bank.guard_sets import Guarded, GuardSet, content_name
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import TOKENS

TABLES = ("guard_sets", "wordings", "configs")
"""The tables of a manifest. What stands in them is named by the first digits of its SHA-256."""
SLOT = "{concept}"
"""What stands for a concept's name in the prompts of a wording."""
# Beyond this many concepts what a guard set leaks is stated once per set, by its worst cases.
_STATED_EACH = 1000
_WORST = 10


@dataclass
class Tables:
    """What the records of a manifest refer to, as the manifest has it."""

    guard_sets: dict[str, Any] = field(default_factory=dict)
    wordings: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)

    def add(self, entry: Entry) -> dict[str, str]:
        """Add what an entry refers to, and return the references."""
        return {
            "wording": self._named(self.wordings, wording(entry.concept)),
            "guards": self.add_set(entry.guard_set),
            "config": self._named(self.configs, _plain(entry.config)),
        }

    def add_set(self, guards: GuardSet) -> str:
        """Add a guard set after all that it extends, and return its name."""
        if guards.id not in self.guard_sets:
            for part in guards.chain():
                self.guard_sets.setdefault(part.id, part.to_dict())
        return guards.id

    def adopt(self, record: Mapping[str, Any], other: Tables) -> dict[str, str]:
        """Take over what a record refers to in another manifest's tables, and return the references."""
        name: str | None = record["guards"]
        missing: list[str] = []
        while name is not None and name not in self.guard_sets:
            missing.append(name)
            name = other.guard_sets[name].get("extends")
        self.guard_sets |= {name: other.guard_sets[name] for name in reversed(missing)}
        self.wordings.setdefault(record["wording"], other.wordings[record["wording"]])
        self.configs.setdefault(record["config"], other.configs[record["config"]])
        return {key: record[key] for key in ("wording", "guards", "config")}

    @staticmethod
    def _named(table: dict[str, Any], value: Mapping[str, Any]) -> str:
        name = content_name(value)
        table.setdefault(name, value)
        return name

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Tables:
        """Return the tables of a manifest."""
        return cls(*(dict(manifest[table]) for table in TABLES))


@lru_cache(maxsize=16)
def _plain(config: SepMEConfig) -> dict[str, Any]:
    """Give settings, which thousands of entries share, as plain values."""
    return config.to_dict()


class Shared:
    """The tables of a manifest as values, each made when it is first asked for.

    Args:
        tables: As the manifest has them, valid.
    """

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._configs: dict[str, SepMEConfig] = {}

    @cached_property
    def guard_sets(self) -> dict[str, GuardSet]:
        """The guard sets by name."""
        sets: dict[str, GuardSet] = {}
        for name, values in self._tables.guard_sets.items():
            sets[name] = GuardSet.from_dict(values, sets)
        return sets

    def guarded(self, concept: str, record: Mapping[str, Any]) -> Guarded:
        """Return what a concept's increment leaves alone."""
        return Guarded(self.guard_sets[record["guards"]], concept)

    def concept(self, name: str, record: Mapping[str, Any]) -> Concept:
        """Make a concept out of its name and its wording."""
        return worded(name, self._tables.wordings[record["wording"]])

    def config(self, record: Mapping[str, Any]) -> SepMEConfig:
        """Return the settings that an entry was made with."""
        name = record["config"]
        if name not in self._configs:
            self._configs[name] = SepMEConfig.from_dict(self._tables.configs[name])
        return self._configs[name]


# --- concepts


def wording(concept: Concept) -> dict[str, Any]:
    """Give a concept's kind, aliases and prompts with "{concept}" in the place of its name: many concepts share them.

    Where a text has "{concept}" in it by itself, the texts are given as they are, and `literal` says so.
    """
    values = {key: value for key, value in concept.to_dict().items() if key != "name"}
    if any(SLOT in text for text in _texts(values)):
        return {**values, "literal": True}
    return {key: value if key == "kind" else _replaced(value, concept.name, SLOT) for key, value in values.items()}


def worded(name: str, values: Mapping[str, Any]) -> Concept:
    """Make the concept of which `wording` gave the rest.

    Raises:
        ValueError: If it is not a concept's.
    """
    values = dict(values)
    if not values.pop("literal", False):
        values = {key: value if key == "kind" else _replaced(value, SLOT, name) for key, value in values.items()}
    return Concept.from_dict({"name": name, **values})


def _replaced(value: Any, old: str, new: str) -> Any:
    return value.replace(old, new) if isinstance(value, str) else [_replaced(part, old, new) for part in value]


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    else:
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


# --- what leaks


def stated_metrics(outlines: Mapping[str, Outline]) -> dict[str, dict[str, Any]]:
    """Give each entry's metrics as the manifest states them, by concept.

    `leakage_of` lists single guards. In a bank of very many concepts only the ten worst cases of the damped guards of
    each set are listed; `leakage_rest` bounds what is not. A guard that should be exact and is not stays listed: what
    is not listed there counts as exact.

    Args:
        outlines: The bank's.
    """
    stated = {name: dict(outline.metrics) for name, outline in outlines.items()}
    if len(outlines) <= _STATED_EACH:
        return stated
    cases: dict[GuardSet, list[tuple[float, str, str]]] = {}
    for name, outline in outlines.items():
        for guard, leak in outline.metrics.get("leakage_of", {}).items():
            cases.setdefault(outline.guards.set, []).append((leak, name, guard))
    for guards, of_set in cases.items():
        damped = set(guards.all_damped)
        for leak, name, guard in sorted(case for case in of_set if case[2] in damped)[:-_WORST]:
            stated[name]["leakage_of"] = {g: x for g, x in stated[name]["leakage_of"].items() if g != guard}
            stated[name]["leakage_rest"] = max(leak, stated[name].get("leakage_rest", 0.0))
    return stated


# --- the base


def base_to_dict(base: BaseModel) -> dict[str, Any]:
    """Give a base as plain values, as JSON has them."""
    values = {**asdict(base), "doors": {name: _door(door) for name, door in base.doors.items()}}
    if base.projections is not None:
        values["projections"] = {name: list(said) for name, said in base.projections.items()}
    return {key: value for key, value in values.items() if value is not None}


def base_from_dict(values: Mapping[str, Any]) -> BaseModel:
    """Read the base that `base_to_dict` wrote."""
    doors = {
        name: Encoding(**{**door, "sketch": tuple(map(tuple, door["sketch"]))})
        for name, door in values["doors"].items()
    }
    doors = {TOKENS: doors.pop(TOKENS)} | doors
    projections = values.get("projections")
    if projections is not None:
        projections = {name: (d_out, norm) for name, (d_out, norm) in projections.items()}
    return BaseModel(values["name"], doors, values["vocabularies"], projections)


def _door(door: Encoding) -> dict[str, Any]:
    values = {**asdict(door), "sketch": [list(row) for row in door.sketch]}
    return {key: value for key, value in values.items() if value is not None}
