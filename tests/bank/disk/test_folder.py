import json
import os
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from folders import replace_shard, reseal, same, shard_of, tree
from sepme_diffusers import BankError, Concept, ConceptBank, Increment, pocket
from sepme_diffusers.bank.disk.folder import BankFolder, sha256
from sepme_diffusers.bank.disk.layout import LOCK, MANIFEST
from sepme_diffusers.bank.rows import digest
from tiny import tiny_bank

LORA = "van-gogh/adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny_bank().save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


def refused(folder: Path, message: str, file: str = "") -> None:
    with pytest.raises(BankError, match=message) as error:
        ConceptBank.from_pretrained(folder)
    assert str(folder / file) in str(error.value)


def refused_when_read(folder: Path, message: str, concept: str = "neon") -> None:
    """The bank loads, with what can be known of it; the concept's numbers are refused, and no other's are."""
    bank = ConceptBank.from_pretrained(folder)
    with pytest.raises(BankError, match=message) as error:
        bank[concept]
    assert str(folder) in str(error.value)
    assert repr(concept) in str(error.value)
    assert bank[next(name for name in bank if name != concept)].increment.rank == 2


def replace_lora(folder: Path, data: bytes) -> None:
    """Other weights of the LoRA, with the hash that they have: only what is in them can give them away."""
    (folder / LORA).write_bytes(data)
    reseal(folder, lambda m: m["concepts"]["Van Gogh"]["files"].update({Path(LORA).name: sha256(data)}))


def test_gates_survive_the_disk_in_both_forms(tmp_path):
    """Lost, an increment would act on prompts that it was promised to leave alone."""
    bank = tiny_bank()
    gates = {"neon": 0.25, "Van Gogh": 1.5}
    gated = {name: replace(e, increment=replace(e.increment, gate=gates[name])) for name, e in bank.items()}
    bank.with_entries(gated.values()).save_pretrained(tmp_path / "bank")
    back = ConceptBank.from_pretrained(tmp_path / "bank")
    assert {name: entry.increment.gate for name, entry in back.items()} == gates


@pytest.mark.parametrize("gate", [0, -1.0, "0.5", None])
def test_a_gate_that_is_none_is_refused(saved, gate):
    reseal(saved, lambda m: m["concepts"]["neon"].update(gates={"tokens": gate}))
    refused(saved, "gate", MANIFEST)


@pytest.mark.parametrize("name", ["styles", "objects"])
def test_shipped_banks_load(name):
    assert len(pocket.bank(name)) >= 10


@pytest.mark.parametrize("what", ["manifest", "shard", "weights", "folder"])
def test_links_are_refused(saved, tmp_path, what):
    """Wherever they lead: what they lead to may change, or be none of the reader's business."""
    places = {"manifest": saved / MANIFEST, "shard": shard_of(saved, "neon"), "weights": saved / LORA}
    link = places.get(what, saved / "van-gogh")
    os.rename(link, tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    refused(saved, "symbolic link", LORA if what == "folder" else str(link.relative_to(saved)))


@pytest.mark.parametrize("what", ["manifest", "shard", "weights"])
def test_what_is_no_plain_file_is_refused_and_not_waited_for(saved, what):
    file = {"manifest": saved / MANIFEST, "shard": shard_of(saved, "neon"), "weights": saved / LORA}[what]
    file.unlink()
    os.mkfifo(file)
    refused(saved, "not a plain file", str(file.relative_to(saved)))
    file.unlink()
    file.mkdir()
    refused(saved, "not a plain file", str(file.relative_to(saved)))


def test_sizes_are_looked_at_before_anything_is_read(saved):
    """A sparse terabyte in place of a shard or of weights, a gigabyte in place of the manifest."""
    for file in (saved / LORA, shard_of(saved, "neon"), saved / MANIFEST):
        size = 2**30 if file.name == MANIFEST else 2**40
        os.truncate(file, size)
        refused(saved, f"has {size} bytes; what the manifest says needs at most", str(file.relative_to(saved)))


def test_a_shard_that_is_larger_than_declared_is_refused(saved):
    """Even by one byte, under a hash that is right."""
    file = replace_shard(saved, "neon", shard_of(saved, "neon").read_bytes() + b"x")
    reseal(saved, lambda m: m["shards"][file.name].update(bytes=file.stat().st_size - 1))
    refused(saved, f"has {file.stat().st_size} bytes; what the manifest says needs at most", file.name)


def test_a_header_that_claims_terabytes_is_refused(saved):
    tensor = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    header = json.dumps({"tokens.A": tensor, "tokens.B": tensor}).encode()
    for size, message in ((2**42, "is no safetensors file"), (2**63, "is no safetensors file")):
        data = struct.pack("<Q", size) + header + bytes(8)
        refused(saved, message, replace_shard(saved, "neon", data).name)
    replace_shard(saved, "neon", struct.pack("<Q", len(header)) + header + bytes(8))
    refused_when_read(saved, "does not hold the rows")
    replace_lora(saved, struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(BankError, match=f"'Van Gogh'.*{saved}"):
        ConceptBank.from_pretrained(saved)["Van Gogh"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(saved, value):
    tensors = load_file(shard_of(saved, "neon"))
    tensors["tokens.B"][0, 0] = value
    replace_shard(saved, "neon", save(tensors), digest(tensors))
    refused_when_read(saved, "must be finite")
    lora = load_file(saved / LORA)
    list(lora.values())[-1][0, 0] = value
    replace_lora(saved, save(lora))
    with pytest.raises(BankError, match=r"'Van Gogh'.*must be finite"):
        ConceptBank.from_pretrained(saved)["Van Gogh"]


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_a_pickle_is_refused_and_never_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"A": torch.zeros(2, 8)}, tmp_path / "tensors")
    for data in (pickle.dumps(Boom()), (tmp_path / "tensors").read_bytes()):
        refused(saved, "is no safetensors file", replace_shard(saved, "neon", data).name)
    tiny_bank().save_pretrained(tmp_path / "again")
    replace_lora(tmp_path / "again", pickle.dumps(Boom()))
    refused_when_read(tmp_path / "again", LORA, "Van Gogh")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"tokens.A": torch.ones(2, 7), "tokens.B": torch.ones(2, 7)}, "width 7 at the door 'tokens'"),
        ({"tokens.A": torch.ones(2, 8), "tokens.B": torch.ones(2, 9)}, "cannot hold"),
        ({"tokens.A": torch.ones(2, 8)}, "these tensors are not an increment's"),
        ({"tokens.B": torch.ones(2, 8)}, "these tensors are not an increment's"),
        ({f"tokens.{x}": torch.ones(2, 8) for x in "ABC"}, "these tensors are not an increment's"),
        ({f"tokens.{x}": torch.ones(2, 8) for x in ("A", "C.x")}, "form 'module', not 'text'"),
        ({f"tokens.{x}": torch.ones(2, 8, 1) for x in "AB"}, "does not hold the rows"),
        ({f"tokens.{x}": torch.ones(1, 8) for x in "AB"}, "does not hold the rows"),
        ({f"tokens.{x}": torch.ones(2, 0) for x in "AB"}, "does not hold the rows"),
        ({f"tokens.{x}": torch.ones(2) for x in "AB"}, "does not hold the rows"),
        ({f"tokens.{x}": torch.ones(2, 8, dtype=torch.int32) for x in "AB"}, "does not hold the rows"),
        ({f"tokens.{x}": torch.ones(2, 8).to(torch.float8_e4m3fn) for x in "AB"}, "does not hold the rows"),
        ({"A": torch.ones(2, 8), "B": torch.ones(2, 8)}, "these tensors are not an increment's"),
    ],
)
def test_rows_that_do_not_fit_the_manifest_are_refused(saved, tensors, message):
    """Under a digest that is true of them, where they can have one."""
    own = {name: rows for name, rows in tensors.items() if name.startswith("tokens.")}
    fit = all(rows.dtype == torch.float32 and rows.numel() for rows in own.values())
    replace_shard(saved, "neon", save(tensors), digest(own) if fit else None)
    refused_when_read(saved, message)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "not the LoRA of an increment"),
        ({"base_model.model.mid.attn2.to_k.lora_A.weight": torch.ones(2, 8)}, "not the LoRA of an increment"),
        (lambda t: {**t, "x": torch.ones(1)}, "unexpected or unpaired keys"),
        (lambda t: {k: v[:1] if "_A" in k else v[:, :1].clone() for k, v in t.items()}, "its digest is of"),
        (lambda t: {k: v * 2 if "_A" in k else v for k, v in t.items()}, "the increment that its digest is of"),
        (lambda t: {k: v * (1 + i) if "_A" in k else v for i, (k, v) in enumerate(t.items())}, "share one lora_A"),
        (lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}, "floating point"),
    ],
)
def test_a_lora_that_does_not_fit_the_manifest_is_refused(saved, tensors, message):
    """Its hash is true of it; the increment that it makes is not the one that the record's digest is of."""
    replace_lora(saved, save(tensors(load_file(saved / LORA)) if callable(tensors) else tensors))
    refused_when_read(saved, message, "Van Gogh")


def test_modules_that_the_base_lacks_are_refused(saved):
    reseal(saved, lambda m: m["base"]["projections"].update({"mid.attn2.to_q": [4, 1.0]}))
    refused_when_read(saved, r"mid\.attn2\.to_q", "Van Gogh")
    reseal(saved, lambda m: m["base"].pop("projections"))
    refused(saved, "is per-module, and the base has no projections", MANIFEST)


def test_a_broken_manifest_is_not_saved_over(saved):
    """Whatever the old manifest is, saving says so and loses nothing."""
    whole = (saved / MANIFEST).read_bytes()
    for broken in (b"", b"[", b'{"format": "sepme_bank", "version": 5}', whole.replace(b"neon", b"noen"), whole[:-9]):
        (saved / MANIFEST).write_bytes(broken)
        before = tree(saved)
        with pytest.raises(BankError, match=MANIFEST):
            tiny_bank(1).save_pretrained(saved)
        assert tree(saved) == before


def test_what_cannot_be_read_back_is_not_written(saved):
    before = tree(saved)
    bank = tiny_bank(1)
    for metrics in ({"loss": float("nan")}, {"loss": object()}, {"seconds": -1}):
        entry = replace(bank["neon"], metrics=metrics)
        with pytest.raises(BankError, match=MANIFEST):
            bank.with_entries([entry]).save_pretrained(saved)
        assert tree(saved) == before
    increment = Increment(bank["neon"].increment.A, B=torch.full((8, 2), 1e5))
    large = replace(bank["neon"], increment=increment)
    with pytest.raises(BankError, match=r"'neon' cannot be saved as torch\.float16"):
        bank.with_entries([large]).save_pretrained(saved, torch.float16)
    assert tree(saved) == before


def test_saving_writes_through_no_link(saved, tmp_path):
    """Links that someone planted lead to nothing being written or removed elsewhere."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    shutil.rmtree(saved / "van-gogh")
    (saved / "van-gogh").symlink_to(tmp_path / "mine")
    (saved / ".sepme_bank.writing").symlink_to(tmp_path / "mine")
    planted = [saved / "README.md", shard_of(saved, "neon")]
    tiny_bank(1).save_pretrained(tmp_path / "other")
    planted.append(saved / shard_of(tmp_path / "other", "neon").name)
    for file in planted:
        file.unlink(missing_ok=True)
        file.symlink_to(tmp_path / "mine" / "notes.txt")
    tiny_bank(1).save_pretrained(saved)
    assert tree(tmp_path / "mine") == {"notes.txt": b"mine"}
    assert same(ConceptBank.from_pretrained(saved), tiny_bank(1))


def test_saving_neither_opens_nor_removes_what_stands_in_the_way(saved):
    """A pipe, which would be waited for, and a file, in the places of concepts' folders."""
    bank = grown(tiny_bank(1))
    for seed in (0, 1):
        grown(tiny_bank(seed)).save_pretrained(saved)
    shutil.rmtree(saved / "van-gogh-0", ignore_errors=True)
    for folder in saved.glob("van-gogh*"):
        shutil.rmtree(folder)
    os.mkfifo(saved / "van-gogh")
    (saved / "van-gogh-0").write_text("mine")
    bank.save_pretrained(saved)
    assert same(ConceptBank.from_pretrained(saved), bank)
    assert (saved / "van-gogh").is_fifo()
    assert (saved / "van-gogh-0").read_text() == "mine"


def grown(bank: ConceptBank) -> ConceptBank:
    entry = bank["Van Gogh"]
    return bank.with_entries([replace(entry, concept=Concept("Van Gogh 0"))])


def test_a_folder_in_the_place_of_a_shard_is_refused_and_nothing_is_lost(saved, tmp_path):
    tiny_bank(1).save_pretrained(tmp_path / "other")
    (saved / shard_of(tmp_path / "other", "neon").name / "mine").mkdir(parents=True)
    before = sorted(saved.rglob("*"))
    with pytest.raises(BankError, match="is a folder, and a file of the bank goes there"):
        tiny_bank(1).save_pretrained(saved)
    assert sorted(saved.rglob("*")) == before
    assert same(ConceptBank.from_pretrained(saved), tiny_bank())


@pytest.mark.parametrize("pattern", ["increments-*", "van-gogh*/*.safetensors", "van-gogh*/*.json", "README.md"])
def test_damaged_files_are_mended_by_saving_again(saved, pattern):
    """The bank was loaded, and has read what it held; or the file was replaced, and the bank still has the old one."""
    for replaced in (False, True):
        bank = ConceptBank.from_pretrained(saved)
        (file,) = saved.glob(pattern)
        if replaced:
            file.unlink()
        else:
            assert len(dict(bank)) == 2
        file.write_bytes(b"damaged")
        bank.save_pretrained(saved)
        assert same(ConceptBank.from_pretrained(saved), bank)
        assert b"damaged" not in tree(saved).values()
        assert len(tree(saved)) == 5


def test_every_file_is_on_the_disk_before_the_manifest_refers_to_it(tmp_path, monkeypatch):
    """A loss of power after the save leaves no manifest without its files; the folders' names are written out too."""
    synced, fsync, move = set(), os.fsync, os.replace

    def note(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def look(source, target):
        if Path(target) == tmp_path / MANIFEST:
            files = {file: file.stat().st_ino in synced for file in tmp_path.rglob("*") if file.name != LOCK}
            assert len(files) >= 6
            assert not [file for file, written in files.items() if not written]
            synced.clear()
        move(source, target)

    monkeypatch.setattr("os.fsync", note)
    monkeypatch.setattr("os.replace", look)
    tiny_bank().save_pretrained(tmp_path)
    assert tmp_path.stat().st_ino in synced


def test_reading_while_another_process_saves_gives_the_new_bank(tmp_path, monkeypatch):
    """The files of the old manifest are gone once it was read: it is read again."""
    old, new = tiny_bank(0), tiny_bank(1)
    old.save_pretrained(tmp_path)
    hold, saves = BankFolder.hold, iter([new])

    def saved_meanwhile(folder, *args):
        for bank in saves:
            bank.save_pretrained(tmp_path)
        return hold(folder, *args)

    monkeypatch.setattr(BankFolder, "hold", saved_meanwhile)
    assert same(ConceptBank.from_pretrained(tmp_path), new)


def test_damage_is_not_read_over_and_over(saved, monkeypatch):
    file, reads, hold = shard_of(saved, "neon"), [], BankFolder.hold
    file.unlink()
    monkeypatch.setattr(BankFolder, "hold", lambda *args: (reads.append(args), hold(*args))[1])
    refused(saved, "is missing", file.name)
    assert len(reads) == 1


@pytest.mark.parametrize("name", ["CON", "nul", "Aux", "com1", "a" * 200])
def test_folders_are_such_as_every_system_takes(name, tmp_path):
    bank = tiny_bank()
    bank = bank.with_entries([replace(bank["Van Gogh"], concept=Concept(name, bank["neon"].concept.pairs))])
    bank.save_pretrained(tmp_path)
    assert same(ConceptBank.from_pretrained(tmp_path), bank)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert not folders & {"con", "nul", "aux", "com1"}
    assert len(folders) == 2
    assert max(map(len, folders)) <= 100
