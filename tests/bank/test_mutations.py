"""Banks broken at random: each loads as it was or is refused by an error that names it, quickly and traceless."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from folders import reseal, same
from sepme_diffusers import BankError, ConceptBank
from sepme_diffusers.bank.folder import sha256
from sepme_diffusers.bank.layout import MANIFEST
from sepme_diffusers.bank.verify import verify
from tiny import tiny_bank

BANK, OTHER = tiny_bank(), tiny_bank(1)
WEIGHTS = ["neon/text_increment.safetensors", "van-gogh/adapter_model.safetensors"]
FILES = [MANIFEST, *WEIGHTS, "van-gogh/adapter_config.json", "README.md"]
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
            float("inf"), "", "neon", "nеon", "../neon/x", "/etc/passwd", "neon/text_increment.safetensors",
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


def mutate_header(folder: Path, rng: random.Random) -> None:
    """A safetensors header that lies, under a hash that is right."""
    name, file = rng.choice([("neon", WEIGHTS[0]), ("Van Gogh", WEIGHTS[1])])
    data = (folder / file).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    edit(header, rng)
    text = json.dumps(header).encode()
    claimed = rng.choice([len(text), len(text), rng.randrange(2**63)])
    changed = struct.pack("<Q", claimed) + text + data[8 + size :]
    (folder / file).write_bytes(changed)
    reseal(folder, lambda manifest: manifest["concepts"][name].update(sha256=sha256(changed)))


# --- structure


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def mutate_structure(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([*FILES, "neon", "van-gogh"])
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
        shutil.copytree(folder / "neon", folder / rng.choice(["Neon", "cat", "van-gogh/neon"]), dirs_exist_ok=True)
    else:
        (folder / rng.choice(["evil.pkl", "neon/evil.bin", ".sepme_bank.lock", "neon/x.safetensors"])).write_bytes(
            b"x"
        )


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    mutate_bytes, mutate_manifest, mutate_and_seal, mutate_header, mutate_structure
]  # fmt: skip


def loaded(folder: Path) -> ConceptBank | None:
    """The bank, or None if it is refused by an error that names its folder."""
    try:
        return ConceptBank.from_pretrained(folder)
    except BankError as error:
        message = str(error)
    assert str(folder) in message
    assert len(message) < 20_000
    return None


def assert_untouched_weights(bank: ConceptBank) -> None:
    """After an edit that was sealed anew: other words, perhaps, but no other numbers."""
    for name, entry in bank.items():
        numbers = {tensor.sum().item() for tensor in entry.increment.tensors().values()}
        known = [{t.sum().item() for t in twin.increment.tensors().values()} for twin in BANK.values()]
        assert numbers in known, name


def assert_saving_is_safe(folder: Path) -> None:
    """Another bank saved over this one is there whole, or refused with nothing lost."""
    before = sorted(str(path) for path in folder.rglob("*"))
    refused = ""
    try:
        OTHER.save_pretrained(folder)
    except BankError as error:
        refused = str(error)
    if not refused:
        assert same(ConceptBank.from_pretrained(folder), OTHER)
        return
    assert str(folder) in refused
    assert sorted(str(path) for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    "count", [pytest.param(500, id="500"), pytest.param(10_000, id="10000", marks=pytest.mark.slow)]
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
        began = time.perf_counter()
        bank = loaded(folder)
        report = verify(folder)
        assert time.perf_counter() - began < SECONDS, i
        assert sorted(os.listdir(folder)) == names, i
        assert sorted(os.listdir(tmp_path)) == ["bank", "sound", "work"], i
        assert not os.listdir(tmp_path / "work"), i
        if bank is None:
            seen[mutation.__name__] += 1
            assert report.faults, i
        elif mutation is mutate_and_seal:
            manifest = json.loads((folder / MANIFEST).read_bytes())
            assert list(bank) == list(manifest["concepts"]), i
            assert_untouched_weights(bank)
        elif mutation is not mutate_header:
            assert same(bank, BANK), i
            assert (bank.base, bank.always) == (BANK.base, BANK.always), i
        if i % 7 == 0:
            assert_saving_is_safe(folder)
            assert sorted(os.listdir(tmp_path)) == ["bank", "sound", "work"], i
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024
    assert all(refused > count / len(MUTATIONS) / 4 for refused in seen.values()), seen
