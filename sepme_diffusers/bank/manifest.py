"""A bank's manifest: from bytes to a dict that was checked, and back. Trusts nothing that it reads."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from jsonschema_rs import Draft202012Validator, ValidationError

from sepme_diffusers.bank.errors import BankError
from sepme_diffusers.bank.layout import LORA_CONFIG, WEIGHTS
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.text.spelling import look_alikes, slug

FORMAT_VERSION = 5
# Parsed, JSON takes up to 30 times its bytes: this bounds the memory that a manifest can claim.
MAX_BYTES = 8 * 2**20
_MAX_DEPTH = 16
# Beyond it integers are not the same in every JSON reader.
_MAX_INTEGER = 2**53
_NO_DIGEST = "0" * 64
_SHOWN = 20
# Listing the faults of more values than this takes seconds: then the first has to do.
_MANY = 30_000


def parse(data: bytes, file: Path) -> dict[str, Any]:
    """Read the manifest in a file's bytes, if nothing is wrong with it.

    Raises:
        BankError: Naming the file and what is wrong with it.
    """
    manifest, faults = examine(data)
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


def seal(manifest: Mapping[str, Any], file: Path) -> bytes:
    """Make the bytes of a manifest's file, with its version and its digest.

    Raises:
        BankError: If the reader would refuse it, saying why.
    """
    head = {"format": "sepme_bank", "version": FORMAT_VERSION, "digest": _NO_DIGEST}
    try:
        blank = json.dumps(head | dict(manifest) | head, indent=2, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise BankError(f"{file} cannot hold this bank: {error}") from error
    # The head comes first, so the first row of zeros is the digest's.
    data = blank.replace(_NO_DIGEST.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)
    parse(data, file)
    return data


def examine(data: bytes) -> tuple[dict[str, Any] | None, list[str]]:
    """Read a manifest, if the bytes have the form of one, and list everything that is wrong with it."""
    if len(data) > MAX_BYTES:
        return None, [f"it has {len(data)} bytes; {MAX_BYTES} are the most"]
    try:
        manifest = _load(data)
        size = _size(manifest)
    except (ValueError, RecursionError) as error:
        return None, [f"it is not JSON as the format wants it: {_short(error)}"]
    if not isinstance(manifest, dict) or manifest.get("format") != "sepme_bank":
        return None, ["it is not the manifest of a concept bank"]
    if fault := _newer(manifest.get("version")):
        return None, [fault]
    if faults := _schema_faults(manifest, all_of_them=size <= _MANY):
        return None, faults
    checks = (
        _digest_faults(manifest, data),
        _fraction_faults(manifest),
        _name_faults(manifest),
        _file_faults(manifest),
    )
    return manifest, [fault for faults in checks for fault in faults]


def joined(faults: Iterable[str]) -> str:
    """Join faults into one message; beyond the first twenty they are counted."""
    faults = list(faults)
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more


def _load(data: bytes) -> Any:
    return json.loads(
        data.decode("utf-8"),
        object_pairs_hook=_no_twins,
        parse_constant=_no_constant,
        parse_float=_finite,
        parse_int=_modest,
    )


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"a key is given twice: {next(key for key in keys if keys.count(key) > 1)!r}")
    return values


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{_short(text)} is not finite")
    return value


def _modest(text: str) -> int:
    if abs(value := int(text)) > _MAX_INTEGER:
        raise ValueError(f"{_short(text)} is out of range")
    return value


def _size(manifest: Any) -> int:
    """Count the values. Refuse depth, and text that no file can hold (lone surrogates)."""
    size, level = 0, [manifest]
    for _ in range(_MAX_DEPTH):
        size += len(level)
        "".join(text for value in level for text in _texts(value)).encode()
        level = [child for value in level for child in _children(value)]
    if level:
        raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")
    return size


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, dict):
        return value
    return [value] if isinstance(value, str) else []


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else []


def _newer(version: Any) -> str | None:
    if type(version) is int and 1 <= version <= FORMAT_VERSION:
        return None
    return (
        f"it is of format version {_short(repr(version))}; this release reads 1 to {FORMAT_VERSION}. "
        "Upgrade sepme_diffusers to read newer banks"
    )


@cache
def _validator() -> Draft202012Validator:
    schema = resources.files("sepme_diffusers.bank") / "schema" / "sepme_bank.schema.json"
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
    return f"{_short('.'.join(map(str, ['$', *error.instance_path])))}: {_short(error.message)}"


def _short(text: object) -> str:
    text = str(text)
    return text if len(text) <= 240 else f"{text[:120]} ... {text[-120:]}"


def _digest_faults(manifest: Mapping[str, Any], data: bytes) -> Iterator[str]:
    if manifest["version"] == 1:
        return
    if not _is_digest(manifest["digest"], data):
        yield "it is damaged or was changed (its SHA-256 is not its digest)"


def _is_digest(digest: str, data: bytes) -> bool:
    blank = data.replace(digest.encode(), _NO_DIGEST.encode())
    return data.count(digest.encode()) == 1 and hashlib.sha256(blank).hexdigest() == digest


def _fraction_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """List integers that are written as fractions: JSON Schema takes 16.0 for an integer, Python does not."""
    whole = {field.name for field in fields(SepMEConfig) if type(field.default) is int}
    base = manifest["base"]
    numbers = {"base.width": base["width"], "base.n_tokens": base["n_tokens"]}
    numbers |= {f"base.doors.{name}": width for name, width in base.get("doors", {}).items()}
    numbers |= {f"base.projections.{name}": d_out for name, (d_out, _) in base["projections"].items()}
    for name, record in manifest["concepts"].items():
        numbers[f"concepts.{name}.rank"] = record["rank"]
        numbers |= {f"concepts.{name}.config.{key}": record["config"][key] for key in whole & record["config"].keys()}
    yield from (f"$.{where}: {n} is not written as an integer" for where, n in numbers.items() if type(n) is not int)


def _name_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    names = list(manifest["concepts"])
    for alike in look_alikes(names):
        yield f"concepts that look alike: {', '.join(map(repr, alike))}"
    if unknown := sorted(set(manifest["policy"]["always"]) - set(names)):
        yield f"the policy always erases {unknown}, which the bank lacks"


def _file_faults(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Check that each concept has a folder of its own, named after it, and nothing outside."""
    holders: dict[str, str] = {}
    for name, record in manifest["concepts"].items():
        path, weights = record["file"], WEIGHTS[record["form"]]
        if not re.fullmatch(rf"[a-z0-9-]+/({'|'.join(map(re.escape, weights))})", path):
            options = " or ".join(f"folder/{file}" for file in weights)
            yield f"concept {name!r}: {_short(repr(path))} is not a file of a concept's folder ({options})"
            continue
        folder = path.split("/")[0]
        own = slug(name)
        if not folder.startswith(own) or not re.fullmatch(r"(-[0-9a-f]{12})*", folder[len(own) :]):
            yield f"concept {name!r}: the folder {folder!r} is not named after it"
        if folder in holders:
            yield f"concept {name!r}: its folder {folder!r} is that of {holders[folder]!r}"
        holders[folder] = name
        if record["rank"] > manifest["base"]["width"]:
            yield f"concept {name!r}: a rank of {record['rank']} exceeds the width {manifest['base']['width']}"
        if wrong := set(record.get("beside", {})) - {LORA_CONFIG}:
            yield f"concept {name!r}: unknown files beside its weights: {sorted(wrong)}"
