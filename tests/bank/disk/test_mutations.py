"""Banks broken at random: each loads as it was or is refused by an error that names it, quickly and traceless."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from folders import manifest_of, replace_shard, reseal, same
from sepme_diffusers import BankError, ConceptBank, Increment
from sepme_diffusers.bank.checks.verify import verify
from sepme_diffusers.bank.disk.folder import sha256
from sepme_diffusers.bank.disk.layout import MANIFEST
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.bank.guard_sets import GuardSet
from tiny import tiny_bank


def varied(seed: int) -> ConceptBank:
    """Both forms, of two doors each or of one, with gates and without, and a chain of guard sets."""
    plain = tiny_bank(seed)
    base = replace(plain.base, doors={**plain.base.doors, "pooled": Encoding(6)})
    pooled = Increment(torch.randn(1, 6), B=torch.randn(6, 1), gate=0.5)
    entries = [
        replace(
            entry,
            concept=replace(entry.concept, name=f"{name} at two doors"),
            increment=replace(entry.increment, doors={"pooled": pooled}, gate=0.25),
            guard_set=GuardSet((), ("pencil", "fox"), extends=entry.guard_set),
        )
        for name, entry in plain.items()
    ]
    return replace(plain, base=base).with_entries(entries)


BANK, OTHER = varied(0), varied(1)
DIGESTS = {entry.digest for entry in BANK.values()}
LORA = "van-gogh/adapter_model.safetensors"
with tempfile.TemporaryDirectory() as _folder:
    BANK.save_pretrained(_folder)
    SHARDS = sorted(manifest_of(Path(_folder))["shards"])
FILES = [MANIFEST, *SHARDS, LORA, "van-gogh/adapter_config.json", "README.md"]
SECONDS, MEGABYTES = 5, 500

# --- bytes


def flip(data: bytearray, rng: random.Random) -> None:
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start : start + rng.randrange(1, 20)] = rng.randbytes(rng.randrange(1, 20))


def cut(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, len(data))]


def insert(data: bytearray, rng: random.Random) -> None:
    start = rng.randrange(len(data))
    data[start:start] = rng.choice([rng.randbytes(9), b"[" * 5_000, b'"', b"{}", b"\0", b"\xff", b"9" * 5_000])


def double(data: bytearray, rng: random.Random) -> None:
    start, end = sorted(rng.randrange(len(data)) for _ in range(2))
    data[start:start] = data[start:end]


def blank(data: bytearray, rng: random.Random) -> None:
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    data[start:end] = bytes(end - start)


def mutate_bytes(folder: Path, rng: random.Random) -> None:
    file = folder / rng.choice(FILES)
    data = bytearray(file.read_bytes())
    rng.choice([flip, flip, overwrite, cut, insert, double, blank])(data, rng)
    file.write_bytes(data)


# --- JSON


def strange(rng: random.Random) -> Any:
    deep: Any = []
    for _ in range(rng.choice([1, 20, 200])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice(
        [
            None, True, False, 0, -1, 1, 2, 3, 2**31, 2**53 + 1, 2**70, 1.0, 0.5, -0.0, 1e308, float("nan"),
            float("inf"), "", "neon", "nеon", "../neon/x", "/etc/passwd", LORA, SHARDS[0], *DIGESTS,
            "x" * 100_000, "\ud800", "\0", "🦊", [], {}, [[]], ["neon"], {"neon": {}}, deep,
        ]
    )  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def edit(value: Any, rng: random.Random) -> None:
    container, key = rng.choice(places(value))
    other, other_key = rng.choice(places(value))
    kind = rng.randrange(6)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(["", "neon", "Neon", "x", "__class__", "digest", key + " "])] = container.pop(key)
    elif kind == 2 and isinstance(container, dict):
        container[str(strange(rng))[:300]] = strange(rng)
    elif kind == 3 and other is not container:
        container[key] = json.loads(json.dumps(other[other_key]))
    else:
        container[key] = strange(rng)


def mutate_manifest(folder: Path, rng: random.Random) -> None:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    edit(manifest, rng)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def mutate_and_seal(folder: Path, rng: random.Random) -> None:
    reseal(folder, lambda manifest: edit(manifest, rng))


def mutate_shard_header(folder: Path, rng: random.Random) -> None:
    """A safetensors header that lies, under hashes that are right."""
    file = rng.choice(SHARDS)
    concept = next(name for name in BANK if shard_of_record(folder, name) == file)
    replace_shard(folder, concept, lying((folder / file).read_bytes(), rng))


def mutate_lora_header(folder: Path, rng: random.Random) -> None:
    changed = lying((folder / LORA).read_bytes(), rng)
    (folder / LORA).write_bytes(changed)
    reseal(folder, lambda m: m["concepts"]["Van Gogh"]["files"].update({Path(LORA).name: sha256(changed)}))


def mutate_numbers(folder: Path, rng: random.Random) -> None:
    """Other bytes in a shard or a LoRA, under a file's hash that is right: the digest of the increment is not."""
    file = folder / rng.choice([*SHARDS, LORA])
    data = bytearray(file.read_bytes())
    rng.choice([flip, overwrite, cut, insert, double, blank])(data, rng)
    if file == folder / LORA:
        file.write_bytes(data)
        reseal(folder, lambda m: m["concepts"]["Van Gogh"]["files"].update({Path(LORA).name: sha256(bytes(data))}))
    else:
        replace_shard(folder, next(n for n in BANK if shard_of_record(folder, n) == file.name), bytes(data))


def shard_of_record(folder: Path, concept: str) -> str | None:
    return manifest_of(folder)["concepts"][concept].get("shard")


def lying(data: bytes, rng: random.Random) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    edit(header, rng)
    text = json.dumps(header).encode()
    claimed = rng.choice([len(text), len(text), len(text), rng.randrange(2**63)])
    return struct.pack("<Q", claimed) + text + data[8 + size :]


# --- structure


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def mutate_structure(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([*FILES, "van-gogh"])
    other = folder / rng.choice(FILES)
    kind = rng.randrange(9)
    if kind == 0:
        remove(path)
    elif kind == 1:
        os.rename(path, path.with_name(rng.choice(["NEON", "x", "neon ", "..neon", path.name + ".bak"])))
    elif kind == 2:
        remove(path)
        path.symlink_to(rng.choice([folder, folder.parent, Path("/dev/zero"), Path("gone"), path, other]))
    elif kind == 3:
        remove(path)
        os.mkfifo(path)
    elif kind == 4:
        remove(path)
        path.mkdir()
    elif kind == 5 and path.is_file():
        os.truncate(path, rng.choice([0, 1, 2**30, 2**40]))
    elif kind == 6 and path.is_file() and other.is_file():
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)
    elif kind == 7:
        place = folder / rng.choice(["Neon", "cat", "van-gogh/neon"])
        shutil.copytree(folder / "van-gogh", place, dirs_exist_ok=True)
    else:
        (
            folder / rng.choice(["evil.pkl", "van-gogh/evil.bin", ".sepme_bank.lock", "van-gogh/x.safetensors"])
        ).write_bytes(b"x")


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    mutate_bytes, mutate_manifest, mutate_and_seal, mutate_shard_header, mutate_lora_header, mutate_numbers,
    mutate_structure,
]  # fmt: skip


def loaded(folder: Path) -> tuple[ConceptBank | None, set[str]]:
    """The bank, and the concepts that are refused when they are read; None for it if it is refused at once.

    Every refusal is an error that names the folder.
    """
    unread = set()
    try:
        bank = ConceptBank.from_pretrained(folder)
    except BankError as error:
        assert_names(folder, error)
        return None, unread
    for name in bank:
        try:
            assert bank[name].digest == bank.entries.outline(name).digest
        except BankError as error:
            assert_names(folder, error)
            unread.add(name)
    return bank, unread


def assert_names(folder: Path, error: BankError) -> None:
    assert str(folder) in str(error)
    assert len(str(error)) < 20_000


def assert_known_numbers(bank: ConceptBank, unread: set[str]) -> None:
    """Whatever the manifest says: what is read are numbers that were saved, and no others."""
    assert {bank[name].digest for name in bank if name not in unread} <= DIGESTS


def assert_saving_is_safe(folder: Path) -> None:
    """Another bank saved over this one is there whole, or refused with nothing lost."""
    before = sorted(str(path) for path in folder.rglob("*"))
    refused = ""
    try:
        OTHER.save_pretrained(folder)
    except BankError as error:
        assert_names(folder, error)
        refused = str(error)
    if not refused:
        assert same(ConceptBank.from_pretrained(folder), OTHER)
        return
    assert sorted(str(path) for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    "count", [pytest.param(140, id="140"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]
)
def test_a_mutated_bank_loads_as_it_was_or_is_refused(count, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    BANK.save_pretrained(tmp_path / "sound")
    folder = tmp_path / "bank"
    loaded(tmp_path / "sound")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = dict.fromkeys((mutation.__name__ for mutation in MUTATIONS), 0)
    for i in range(count):
        rng = random.Random(i)
        mutation = MUTATIONS[i % len(MUTATIONS)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "sound", folder)
        mutation(folder, rng)
        names = sorted(os.listdir(folder))
        # Of this process alone: what else the machine does is not the bank's fault.
        began = time.process_time()
        bank, unread = loaded(folder)
        report = verify(folder)
        assert time.process_time() - began < SECONDS, i
        assert sorted(os.listdir(folder)) == names, i
        assert sorted(os.listdir(tmp_path)) == ["bank", "sound", "work"], i
        assert not os.listdir(tmp_path / "work"), i
        if bank is None or unread:
            seen[mutation.__name__] += 1
            assert report.faults, i
        if bank is not None:
            assert_known_numbers(bank, unread)
            assert list(bank) == list(manifest_of(folder)["concepts"]), i
        if bank is not None and not unread and mutation is not mutate_and_seal:
            assert same(bank, BANK), i
            assert (bank.base, bank.always) == (BANK.base, BANK.always), i
        if i % 7 == 0:
            assert_saving_is_safe(folder)
            assert sorted(os.listdir(tmp_path)) == ["bank", "sound", "work"], i
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024
    assert all(refused > count / len(MUTATIONS) / 4 for refused in seen.values()), seen
