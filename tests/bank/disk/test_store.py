"""What a loaded bank still holds when its folder changes, and which files it opens."""

import gc
import os
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from folders import manifest_of, same, shard_of
from sepme_diffusers import BankError, Concept, ConceptBank
from sepme_diffusers.bank.disk import shards, store
from sepme_diffusers.bank.disk.folder import BankFolder
from tiny import crowd, tiny_bank


@pytest.fixture
def saved(tmp_path):
    tiny_bank().save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


def large(seed: int) -> ConceptBank:
    """Files of more than is read at once when a bank is loaded."""
    bank = crowd((str(i) for i in range(1200)), rank=2, seed=seed)
    return bank.with_entries([replace(tiny_bank()["neon"], concept=Concept("neon"))])


@pytest.mark.parametrize("make", [tiny_bank, large])
@pytest.mark.parametrize("change", ["saved over", "deleted"])
def test_a_loaded_bank_stays_whole(change, make, tmp_path):
    make(0).save_pretrained(tmp_path / "bank")
    bank = ConceptBank.from_pretrained(tmp_path / "bank")
    if change == "saved over":
        make(1).save_pretrained(tmp_path / "bank", pack=True)
    else:
        shutil.rmtree(tmp_path / "bank")
    assert same(bank, make(0))


def test_what_is_changed_after_loading_is_refused_when_it_is_read(tmp_path):
    """That concept alone; nobody gets other numbers than the digest's."""
    original = large(0)
    original.save_pretrained(tmp_path)
    bank = ConceptBank.from_pretrained(tmp_path)
    shard = shard_of(tmp_path, "17")
    data = shard.read_bytes()
    place = data.index(original["17"].increment.A.numpy().tobytes())
    with shard.open("r+b") as file:
        file.seek(place)
        file.write(b"\x00")
    with pytest.raises(BankError, match=f"concept '17': .*{shard.name} is damaged or was changed"):
        bank["17"]
    assert same(bank.subset(["16", "18", "neon"]), original.subset(["16", "18", "neon"]))
    os.truncate(shard, 1000)
    with pytest.raises(BankError, match="concept '19'"):
        bank["19"]
    shard.write_bytes(data)
    assert torch.equal(bank["17"].increment.A, original["17"].increment.A)


def test_some_concepts_open_no_more_files_than_they_need(saved, monkeypatch):
    bank = tiny_bank()
    for name in ("oil", "ink"):
        bank = bank.with_entries(
            [replace(bank["neon"], concept=Concept(name), increment=tiny_bank(3)["neon"].increment)]
        )
        bank.save_pretrained(saved)
    opened, hold = [], BankFolder.hold
    monkeypatch.setattr(
        BankFolder, "hold", lambda self, path, *args: (opened.append(path), hold(self, path, *args))[1]
    )
    some = ConceptBank.from_pretrained(saved, concepts=["neon", "ink"])
    assert same(some, bank.subset(["neon", "ink"]))
    assert sorted(opened) == sorted({shard_of(saved, name).name for name in ("neon", "ink")})


def test_very_many_files_do_not_use_up_what_a_process_may_open(tmp_path, monkeypatch):
    """A bank that grew by one concept at a time has a shard for each; trained ones have a folder each."""
    monkeypatch.setattr(shards, "_FULL", 1)
    monkeypatch.setattr(store, "_SMALL", 0)
    bank = tiny_bank()
    for name, entry in tiny_bank().items():
        bank = bank.with_entries(replace(entry, concept=Concept(f"{name} {i}")) for i in range(70))
    torch.manual_seed(1)
    bank = bank.with_entries(
        replace(entry, increment=replace(entry.increment, B=torch.randn(8, 2)))
        for entry in bank.values()
        if entry.form == "text"
    )
    bank.save_pretrained(tmp_path)
    assert len(manifest_of(tmp_path)["shards"]) == 71
    before = len(os.listdir("/proc/self/fd"))
    back = ConceptBank.from_pretrained(tmp_path)
    assert 0 < len(os.listdir("/proc/self/fd")) - before <= 64
    shutil.rmtree(tmp_path)
    assert same(back, bank)
    del back
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_increments_digest_does_not_depend_on_where_its_rows_lie(tmp_path):
    bank = crowd("abcdef", rank=2)
    names = {0: "abcdef", 1: "fedcba", 2: "be"}
    for i, order in names.items():
        ConceptBank(bank.base, {name: bank[name] for name in order}).save_pretrained(tmp_path / str(i))
    records = [manifest_of(tmp_path / str(i))["concepts"] for i in names]
    assert len({tuple(record["b"]["rows"]["tokens"]) for record in records}) == 3
    assert len({record["b"]["digest"] for record in records} | {bank["b"].digest}) == 1


def test_threads_that_read_at_once_get_one_entry(tmp_path):
    crowd(map(str, range(50))).save_pretrained(tmp_path)
    bank, found = ConceptBank.from_pretrained(tmp_path), []
    start = threading.Barrier(8)

    def read():
        start.wait()
        found.append([bank[name] for name in bank])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(mine is first for own in found for mine, first in zip(own, found[0], strict=True))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_read_and_refuses_a_save(saved):
    os.chmod(saved, 0o555)
    try:
        assert same(ConceptBank.from_pretrained(saved), tiny_bank())
        with pytest.raises((BankError, OSError)):
            tiny_bank(1).save_pretrained(saved)
    finally:
        os.chmod(saved, 0o755)
    assert same(ConceptBank.from_pretrained(saved), tiny_bank())


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_bank(saved, failing, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    name = {"write": "pathlib.Path.write_bytes", "fsync": "os.fsync", "replace": "os.replace"}[failing]
    with monkeypatch.context() as patched:
        patched.setattr(name, full)
        with pytest.raises(OSError, match="No space left"):
            tiny_bank(1).save_pretrained(saved)
    assert same(ConceptBank.from_pretrained(saved), tiny_bank())
    assert not list(saved.glob(".*"))
    tiny_bank(1).save_pretrained(saved)
    assert same(ConceptBank.from_pretrained(saved), tiny_bank(1))
