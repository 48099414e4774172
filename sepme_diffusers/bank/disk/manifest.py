"""A bank's manifest: from bytes to a dict that was checked, and back. Trusts nothing that it reads."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from jsonschema_rs import Draft202012Validator, ValidationError
from pydantic_core import from_json

from sepme_diffusers.bank.disk.layout import shard_name
from sepme_diffusers.bank.disk.records import SLOT, TABLES
from sepme_diffusers.bank.errors import BankError, PolicyError, short
from sepme_diffusers.bank.guard_sets import GuardSet, content_name
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.text.encoding import TOKENS
from sepme_diffusers.text.names import some
from sepme_diffusers.text.spelling import is_visible, look_alikes, slug

FORMAT_VERSION = 1
# Parsed, JSON takes up to 30 times its bytes: this bounds the memory that a manifest can claim.
MAX_BYTES = 16 * 2**20
_MAX_DEPTH = 16
_MAX_PROMPTS = 2**28
# Beyond it integers are not the same in every JSON reader.
_MAX_INTEGER = 2**53
_NO_DIGEST = "0" * 64
_SHOWN = 20
# Listing the faults of more values than this takes seconds: then the first has to do.
_MANY = 30_000
_KEY_ENDS = (b'":', b" :", b"\n:", b"\t:", b"\r:")
# What has a line for each of its members, so that a change of one concept is a change of one line.
_BY_LINE = ("shards", *TABLES, "concepts")


def parse(data: bytes, file: Path, wanted: Sequence[str] | None = None) -> dict[str, Any]:
    """Read the manifest in a file's bytes, if nothing is wrong with it.

    Args:
        data: The bytes.
        file: The file, for messages.
        wanted: Names: then these concepts alone are checked and returned, with what they refer to. Default: all.

    Raises:
        BankError: Naming the file and what is wrong with it.
        KeyError: If it lacks one of the wanted.
        PolicyError: If `wanted` leaves out a concept that the policy always erases.
    """
    manifest, faults = examine(data, wanted)
    if manifest is None or faults:
        raise BankError(f"{file} is not a valid bank manifest: {joined(faults)}")
    return manifest


def is_damaged(data: bytes) -> bool:
    """Tell whether a manifest's bytes cannot be those that were written: no JSON, or not what the digest says.

    A manifest of another version, or one that the schema refuses, is not damaged if its digest is true.
    """
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        return True
    digest = manifest.get("digest") if isinstance(manifest, dict) else None
    return not isinstance(digest, str) or not _is_digest(digest, data)


def records_in(data: bytes) -> dict[str, Any]:
    """Return every concept's record in the bytes of a manifest, of which the wanted part has been checked."""
    records: dict[str, Any] = json.loads(data)["concepts"]
    return records


def seal(manifest: Mapping[str, Any], file: Path) -> bytes:
    """Make the bytes of a manifest's file, with its version and its digest.

    Raises:
        BankError: If the reader would refuse it, saying why.
    """
    head = {"format": "sepme_bank", "version": FORMAT_VERSION, "digest": _NO_DIGEST}
    try:
        blank = _written(head | dict(manifest) | head).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(f"{file} cannot hold this bank: {error}") from error
    # The head comes first, so the first row of zeros is the digest's.
    data = blank.replace(_NO_DIGEST.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)
    parse(data, file)
    return data


def _written(manifest: Mapping[str, Any]) -> str:
    """Write JSON with one line for each key, and for each member of what has many."""
    members = []
    for key, value in manifest.items():
        if key in _BY_LINE and value:
            lines = ",\n".join(f"{_compact(name)}:{_compact(member)}" for name, member in value.items())
            members.append(f"{_compact(key)}:{{\n{lines}\n}}")
        else:
            members.append(f"{_compact(key)}:{_compact(value)}")
    return "{\n" + ",\n".join(members) + "\n}\n"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def examine(data: bytes, wanted: Sequence[str] | None = None) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a manifest, if the bytes have the form of one, and list everything that is wrong with it.

    Args:
        data: The bytes.
        wanted: See `parse`.

    Raises:
        KeyError: See `parse`.
        PolicyError: See `parse`.
    """
    if len(data) > MAX_BYTES:
        return None, [f"it has {len(data)} bytes; {MAX_BYTES} are the most"]
    try:
        manifest = _values(data)
    except (ValueError, RecursionError) as error:
        return None, [f"it is not JSON as the format wants it: {short(error)}"]
    if not isinstance(manifest, dict) or manifest.get("format") != "sepme_bank":
        return None, ["it is not the manifest of a concept bank"]
    if fault := _other_version(manifest.get("version")):
        return None, [fault]
    if wanted is not None:
        manifest = _of_wanted(manifest, wanted)
    try:
        size = _size(manifest)
    except (ValueError, RecursionError) as error:
        return None, [f"it is not JSON as the format wants it: {short(error)}"]
    if faults := _schema_faults(manifest, all_of_them=size <= _MANY):
        return None, faults
    checks = (
        _digest_faults(manifest, data),
        _fraction_faults(manifest),
        _table_faults(manifest),
        _name_faults(manifest),
        _wording_faults(manifest),
        _file_faults(manifest),
    )
    return manifest, [fault for faults in checks for fault in faults]


def _of_wanted(manifest: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Leave out the concepts that are not wanted and what they alone refer to; a malformed manifest stays whole."""
    concepts, policy = manifest.get("concepts"), manifest.get("policy")
    always = policy.get("always") if isinstance(policy, dict) else None
    tables: dict[str, Any] = {table: manifest.get(table) for table in ("shards", *TABLES)}
    if not isinstance(concepts, dict) or not isinstance(always, list):
        return manifest
    if unknown := [name for name in wanted if name not in concepts]:
        raise KeyError(f"no concepts {unknown} in this bank; it has {some(concepts)}")
    if left_out := sorted(map(str, set(map(str, always)) - set(wanted))):
        raise PolicyError(f"the bank's policy always erases {left_out}; load them as well")
    records = {name: concepts[name] for name in concepts if name in set(wanted)}
    if not all(isinstance(part, dict) for part in (*tables.values(), *records.values())):
        return {**manifest, "concepts": records}
    keys = {"shards": "shard", "guard_sets": "guards", "wordings": "wording", "configs": "config"}
    for table, key in keys.items():
        named = {record.get(key) for record in records.values() if isinstance(record.get(key), str)}
        if table == "guard_sets":
            named = _with_extended(tables[table], named)
        tables[table] = {name: value for name, value in tables[table].items() if name in named}
    return {**manifest, **tables, "concepts": records}


def _with_extended(sets: Mapping[str, Any], named: Iterable[Any]) -> set[Any]:
    """The sets of these names, and all that they extend."""
    found: set[Any] = set()
    for name in named:
        while isinstance(name, str) and name not in found:
            found.add(name)
            values = sets.get(name)
            name = values.get("extends") if isinstance(values, dict) else None
    return found


def joined(faults: Iterable[str]) -> str:
    """Join faults into one message; beyond the first twenty they are counted."""
    faults = list(faults)
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more


def _values(data: bytes) -> Any:
    """Read strict JSON, in which no key is there twice."""
    values = from_json(data, allow_inf_nan=False)
    # Behind each key there is a colon. Where there are no more of them than keys that were read, no key was lost. A
    # colon inside of a text may be one too many: then the text is read again, which takes three times as long.
    n_keys = _n_keys(values)
    if data.count(b":") != n_keys and sum(map(data.count, _KEY_ENDS)) != n_keys:
        json.loads(data, object_pairs_hook=_no_twins)
    return values


def _n_keys(values: Any) -> int:
    """Count the keys of all objects."""
    n_keys, level = 0, [values]
    while level:
        objects = [value for value in level if type(value) is dict]
        arrays = (value for value in level if type(value) is list)
        n_keys += sum(map(len, objects))
        members = chain(*(value.values() for value in objects), *arrays)
        level = [value for value in members if type(value) is dict or type(value) is list]
    return n_keys


def _no_twins(pairs: list[tuple[str, Any]]) -> None:
    keys = Counter(key for key, _ in pairs)
    if twins := [key for key, count in keys.items() if count > 1]:
        raise ValueError(f"a key is given twice: {twins[0]!r}")


def _size(manifest: Any) -> int:
    """Count the values. Refuse depth, numbers out of range, and text that no file can hold (lone surrogates)."""
    size, level = 0, [manifest]
    for _ in range(_MAX_DEPTH):
        size += len(level)
        # By type and not by value: there may be millions.
        of = defaultdict[type, list[Any]](list)
        for value in level:
            of[type(value)].append(value)
        "".join(chain(of[str], *of[dict])).encode()
        if not all(map(math.isfinite, of[float])):
            raise ValueError("a number is not finite")
        if of[int] and not -_MAX_INTEGER <= min(of[int]) <= max(of[int]) <= _MAX_INTEGER:
            raise ValueError("an integer is out of range")
        level = list(chain(*(members.values() for members in of[dict]), *of[list]))
    if level:
        raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")
    return size


def _other_version(version: Any) -> str | None:
    if type(version) is int and version == FORMAT_VERSION:
        return None
    return (
        f"it is of format version {short(repr(version))}; this release reads version {FORMAT_VERSION}. "
        "Upgrade sepme_diffusers to read newer banks"
    )


@cache
def _validator() -> Draft202012Validator:
    schema = resources.files("sepme_diffusers.bank.disk") / "schema" / "sepme_bank.schema.json"
    return Draft202012Validator(json.loads(schema.read_text("utf-8")))


def _schema_faults(manifest: Any, all_of_them: bool) -> list[str]:
    if all_of_them:
        return [_schema_fault(error) for error in _validator().iter_errors(manifest)]
    try:
        _validator().validate(manifest)
    except ValidationError as error:
        return [_schema_fault(error)]
    return []


def _schema_fault(error: ValidationError) -> str:
    return f"{short('.'.join(map(str, ['$', *error.instance_path])))}: {short(error.message)}"


def _digest_faults(manifest: Mapping[str, Any], data: bytes) -> Iterator[str]:
    if not _is_digest(manifest["digest"], data):
        yield "it is damaged or was changed (its SHA-256 is not its digest)"


def _is_digest(digest: str, data: bytes) -> bool:
    blank = data.replace(digest.encode(), _NO_DIGEST.encode())
    return data.count(digest.encode()) == 1 and hashlib.sha256(blank).hexdigest() == digest


def _fraction_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """List integers that are written as fractions: JSON Schema takes 16.0 for an integer, Python does not."""
    for where, number in _integers(manifest):
        if type(number) is not int:
            yield f"$.{'.'.join(where)}: {number} is not written as an integer"


def _integers(manifest: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield everything that should be an integer, with where it is."""
    whole = {field.name for field in fields(SepMEConfig) if type(field.default) is int}
    base = manifest["base"]
    for name, door in base["doors"].items():
        for key in door.keys() & {"width", "n_tokens", "max_length"}:
            yield ("base", "doors", name, key), door[key]
    for name, (d_out, _) in base.get("projections", {}).items():
        yield ("base", "projections", name), d_out
    for name, shard in manifest["shards"].items():
        yield ("shards", name, "bytes"), shard["bytes"]
    for name, config in manifest["configs"].items():
        for key in whole & config.keys():
            yield ("configs", name, key), config[key]
    for name, record in manifest["concepts"].items():
        if "rank" in record:
            yield ("concepts", name, "rank"), record["rank"]
        for door, (first, behind) in record.get("rows", {}).items():
            yield ("concepts", name, "rows", door), first
            yield ("concepts", name, "rows", door), behind


def _table_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Check that tables are named by what they hold, that what is referred to is there, and chains of guard sets."""
    for table in TABLES:
        if wrong := [name for name, value in manifest[table].items() if content_name(value) != name]:
            yield f"{table}: {some(wrong)} are not named by their content"
    yield from _chain_faults(manifest["guard_sets"])
    keys = {"shard": "shards", "guards": "guard_sets", "wording": "wordings", "config": "configs"}
    for name, record in manifest["concepts"].items():
        for key, table in keys.items():
            if key in record and record[key] not in manifest[table]:
                yield f"concept {name!r}: its {key} {record[key]!r} is not in {table}"


def _chain_faults(sets: Mapping[str, Any]) -> Iterator[str]:
    """Check that each set extends one that stands before it, and that no prompt is there twice."""
    made: dict[str, GuardSet] = {}
    for name, values in sets.items():
        if (extends := values.get("extends")) is not None and extends not in made:
            yield f"guard set {name!r} extends {extends!r}, which does not stand before it"
            return
        try:
            made[name] = GuardSet.from_dict(values, made)
        except ValueError as error:
            yield f"guard set {name!r}: {error}"
            return


def _name_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    names = list(manifest["concepts"])
    if unusable := [name for name in names if not name.isprintable() or not is_visible(name)]:
        yield f"concepts need printable names, not {some(unusable)}"
    for alike in look_alikes(names):
        yield f"concepts that look alike: {', '.join(map(repr, alike))}"
    if unknown := sorted(set(manifest["policy"]["always"]) - set(names)):
        yield f"the policy always erases {unknown}, which the bank lacks"


def _wording_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Bound what prompts take once names stand in them: concepts share a wording, and not its prompts."""
    texts = {name: _compact(values) for name, values in manifest["wordings"].items()}
    sizes = {name: (len(text), text.count(SLOT)) for name, text in texts.items()}
    taken = 0
    for name, record in manifest["concepts"].items():
        length, slots = sizes.get(record["wording"], (0, 0))
        taken += (length + slots * len(name)) if slots else 0
    if taken > _MAX_PROMPTS:
        yield f"the concepts' prompts take {taken} characters; {_MAX_PROMPTS} are the most"


def _file_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Check shards and rows, and that each concept with a folder has one of its own, named after it."""
    if wrong := [name for name, shard in manifest["shards"].items() if name != shard_name(shard["sha256"])]:
        yield f"shards: {some(wrong)} are not named by their content"
    holders: dict[str, str] = {}
    doors = manifest["base"]["doors"]
    for name, record in manifest["concepts"].items():
        ranks = {door: behind - first for door, (first, behind) in record.get("rows", {}).items()}
        for door, rank in ({TOKENS: record["rank"]} if "rank" in record else ranks).items():
            if door not in doors:
                yield f"concept {name!r}: it acts at the door {door!r}, which the base lacks"
            elif not 1 <= rank <= doors[door]["width"]:
                yield f"concept {name!r}: a rank of {rank} is not from 1 to the width {doors[door]['width']}"
        if unknown := sorted(record.get("gates", {}).keys() - (ranks.keys() or {TOKENS})):
            yield f"concept {name!r}: it has gates at the doors {unknown}, where it does not act"
        if record["form"] == "module" and "projections" not in manifest["base"]:
            yield f"concept {name!r}: it is per-module, and the base has no projections"
        folder = record.get("folder") or record.get("adapter", {}).get("folder")
        if folder is None:
            continue
        own = slug(name)
        if not folder.startswith(own) or not re.fullmatch(r"(-[0-9a-f]{12})*", folder[len(own) :]):
            yield f"concept {name!r}: the folder {folder!r} is not named after it"
        if folder in holders:
            yield f"concept {name!r}: its folder {folder!r} is that of {holders[folder]!r}"
        holders[folder] = name
