import json
import os
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from folders import reseal, same, tree
from sepme_diffusers import BankError, Concept, ConceptBank, Increment, pocket
from sepme_diffusers.bank.folder import BankFolder, sha256
from sepme_diffusers.bank.layout import LOCK, MANIFEST
from sepme_diffusers.bank.manifest import FORMAT_VERSION
from tiny import tiny_bank

FIXTURES = Path(__file__).parents[1] / "fixtures"
VERSION_1 = FIXTURES / "bank-version-1"
TEXT, LORA = "neon/text_increment.safetensors", "van-gogh/adapter_model.safetensors"


@pytest.fixture
def saved(tmp_path) -> Path:
    tiny_bank().save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


def refused(folder: Path, message: str, file: str = "") -> None:
    with pytest.raises(BankError, match=message) as error:
        ConceptBank.from_pretrained(folder)
    assert str(folder / file) in str(error.value)


def replace_weights(folder: Path, data: bytes, name: str = "neon", file: str = TEXT) -> None:
    """Other weights, with the hash that they have: only what is in them can give them away."""
    (folder / file).write_bytes(data)
    reseal(folder, lambda m: m["concepts"][name].update(sha256=sha256(data)))


def test_a_bank_of_version_1_still_loads_and_becomes_one_of_today(tmp_path):
    bank = ConceptBank.from_pretrained(VERSION_1)
    assert same(bank, tiny_bank())
    assert bank.always == ("neon",)
    shutil.copytree(VERSION_1, tmp_path / "bank")
    bank.save_pretrained(tmp_path / "bank")
    manifest = json.loads((tmp_path / "bank" / MANIFEST).read_bytes())
    assert manifest["version"] == FORMAT_VERSION
    assert set(manifest["concepts"]["Van Gogh"]["beside"]) == {"adapter_config.json"}
    assert same(ConceptBank.from_pretrained(tmp_path / "bank"), bank)
    weights = {file: data for file, data in tree(VERSION_1).items() if file.endswith(".safetensors")}
    assert weights.items() <= tree(tmp_path / "bank").items()


@pytest.mark.parametrize("version", [2, 3, 4])
def test_a_bank_of_an_older_version_still_loads_and_becomes_one_of_today(tmp_path, version):
    bank = ConceptBank.from_pretrained(FIXTURES / f"bank-version-{version}")
    assert same(bank, tiny_bank())
    bank.save_pretrained(tmp_path / "bank")
    assert json.loads((tmp_path / "bank" / MANIFEST).read_bytes())["version"] == FORMAT_VERSION


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
    reseal(saved, lambda m: m["concepts"]["neon"].update(gate=gate))
    refused(saved, "gate", MANIFEST)


@pytest.mark.parametrize("name", ["styles", "objects"])
def test_shipped_banks_load(name):
    assert len(pocket.bank(name)) >= 10


def test_a_renamed_concept_of_version_1_is_refused(tmp_path):
    """It has no digest; the folder's name gives it away."""
    shutil.copytree(VERSION_1, tmp_path / "bank")
    text = (VERSION_1 / MANIFEST).read_text("utf-8").replace('"neon": {', '"noen": {').replace('"neon"\n', '"noen"\n')
    (tmp_path / "bank" / MANIFEST).write_text(text, "utf-8")
    refused(tmp_path / "bank", "'neon' is not named after it", MANIFEST)


@pytest.mark.parametrize("what", ["manifest", "weights", "folder"])
def test_links_are_refused(saved, tmp_path, what):
    """Wherever they lead: what they lead to may change, or be none of the reader's business."""
    link = saved / {"manifest": MANIFEST, "weights": TEXT, "folder": "neon"}[what]
    os.rename(link, tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    refused(saved, "symbolic link", MANIFEST if what == "manifest" else TEXT)


@pytest.mark.parametrize("file", [MANIFEST, TEXT])
def test_what_is_no_plain_file_is_refused_and_not_waited_for(saved, file):
    (saved / file).unlink()
    os.mkfifo(saved / file)
    refused(saved, "not a plain file", file)
    (saved / file).unlink()
    (saved / file).mkdir()
    refused(saved, "not a plain file", file)


def test_sizes_are_looked_at_before_anything_is_read(saved):
    """A sparse terabyte in place of the weights, a gigabyte in place of the manifest."""
    os.truncate(saved / TEXT, 2**40)
    refused(saved, f"has {2**40} bytes; what the manifest says needs at most", TEXT)
    os.truncate(saved / MANIFEST, 2**30)
    refused(saved, f"has {2**30} bytes", MANIFEST)


def test_a_header_that_claims_terabytes_is_refused(saved):
    tensor = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    header = json.dumps({"A": tensor, "B": tensor}).encode()
    for size in (len(header), 2**42, 2**63):
        replace_weights(saved, struct.pack("<Q", size) + header + bytes(8))
        refused(saved, "holds no increment", TEXT)


@pytest.mark.parametrize("file", [TEXT, LORA])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(saved, file, value):
    tensors = load_file(saved / file)
    list(tensors.values())[-1][0, 0] = value
    save_file(tensors, saved / file)
    replace_weights(saved, (saved / file).read_bytes(), "neon" if file == TEXT else "Van Gogh", file)
    refused(saved, "must be finite", file)


class Boom:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_a_pickle_is_refused_and_never_run(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replace_weights(saved, pickle.dumps(Boom()))
    refused(saved, "holds no increment", TEXT)
    torch.save({"A": torch.zeros(2, 8)}, saved / TEXT)
    replace_weights(saved, (saved / TEXT).read_bytes()[:1500])
    refused(saved, "holds no increment", TEXT)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"A": torch.ones(3, 8), "B": torch.ones(8, 3)}, "rank 3, not 2"),
        ({"A": torch.ones(2, 7), "B": torch.ones(7, 2)}, "width 7, not 8"),
        ({"A": torch.ones(2, 8), "B": torch.ones(8, 3)}, "cannot hold"),
        ({"A": torch.ones(2, 8)}, "has the tensors A and B, not"),
        ({"A": torch.ones(2, 8), "B": torch.ones(8, 2), "C": torch.ones(1)}, "holds no increment"),
        ({"A": torch.ones(2, 8, dtype=torch.int32), "B": torch.ones(8, 2)}, "floating point"),
        ({"A": torch.ones(2, 8).to(torch.float8_e4m3fn), "B": torch.ones(8, 2)}, "floating point"),
    ],
)
def test_weights_that_do_not_fit_the_manifest_are_refused(saved, tensors, message):
    save_file(tensors, saved / TEXT)
    replace_weights(saved, (saved / TEXT).read_bytes())
    refused(saved, message, TEXT)


def test_modules_that_the_base_lacks_are_refused(saved):
    reseal(saved, lambda m: m["base"]["projections"].pop("mid.attn2.to_v"))
    refused(saved, r"mid\.attn2\.to_v", LORA)


def test_a_broken_manifest_is_not_saved_over(saved):
    """Whatever the old manifest is, saving says so and loses nothing."""
    whole = (saved / MANIFEST).read_bytes()
    for broken in (b"", b"[", b'{"format": "sepme_bank", "version": 4}', whole.replace(b"neon", b"noen"), whole[:-9]):
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
    shutil.rmtree(saved / "neon")
    (saved / "neon").symlink_to(tmp_path / "mine")
    (saved / ".sepme_bank.writing").symlink_to(tmp_path / "mine")
    (saved / "README.md").unlink()
    (saved / "README.md").symlink_to(tmp_path / "mine" / "notes.txt")
    tiny_bank(1).save_pretrained(saved)
    assert tree(tmp_path / "mine") == {"notes.txt": b"mine"}
    assert same(ConceptBank.from_pretrained(saved), tiny_bank(1))


def test_saving_neither_opens_nor_removes_what_stands_in_the_way(saved):
    """A pipe, which would be waited for, and a file, in the places of concepts' folders."""
    shutil.rmtree(saved / "neon")
    os.mkfifo(saved / "neon")
    shutil.rmtree(saved / "van-gogh")
    (saved / "van-gogh").write_text("mine")
    tiny_bank(1).save_pretrained(saved)
    assert same(ConceptBank.from_pretrained(saved), tiny_bank(1))
    assert (saved / "neon").is_fifo()
    assert (saved / "van-gogh").read_text() == "mine"


def test_damaged_files_are_mended_by_saving_again(saved):
    bank = ConceptBank.from_pretrained(saved)
    for pattern in ("neon*/*", "van-gogh*/*.safetensors", "van-gogh*/*.json", "README.md"):
        (file,) = saved.glob(pattern)
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
            assert len(files) >= 8
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
    read = BankFolder.increment
    saves = iter([new])

    def saved_meanwhile(folder, *args):
        for bank in saves:
            bank.save_pretrained(tmp_path)
        return read(folder, *args)

    monkeypatch.setattr(BankFolder, "increment", saved_meanwhile)
    assert same(ConceptBank.from_pretrained(tmp_path), new)


def test_damage_is_not_read_over_and_over(tmp_path, monkeypatch):
    tiny_bank().save_pretrained(tmp_path)
    (tmp_path / TEXT).unlink()
    reads = []
    read = BankFolder.increment
    monkeypatch.setattr(BankFolder, "increment", lambda *args: (reads.append(args), read(*args))[1])
    refused(tmp_path, "is missing", TEXT)
    assert len(reads) == 1


@pytest.mark.parametrize("name", ["CON", "nul", "Aux", "com1", "a" * 200])
def test_folders_are_such_as_every_system_takes(name, tmp_path):
    bank = tiny_bank()
    bank = bank.with_entries([replace(bank["neon"], concept=Concept(name, bank["neon"].concept.pairs))])
    bank.save_pretrained(tmp_path)
    assert same(ConceptBank.from_pretrained(tmp_path), bank)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert not folders & {"con", "nul", "aux", "com1"}
    assert max(map(len, folders)) <= 100
