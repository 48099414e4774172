"""Banks of more increments than are measured when they are loaded: the others are when they are first erased."""

import shutil
from dataclasses import replace

import pytest
import torch

from sepme_diffusers import BankError, ConceptBank, ErasureNotInForce, Increment
from sepme_diffusers.bank.guard_readings import MOST_ENTRIES
from small import latents, wide


@pytest.fixture(scope="module")
def saved(text_bank, tmp_path_factory):
    """A folder with more concepts than are sampled, every third of them "neon"."""
    bank = wide(text_bank, copies=MOST_ENTRIES)
    assert len(bank) > MOST_ENTRIES
    folder = tmp_path_factory.mktemp("large") / "bank"
    bank.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "bank")


def unsampled(bank: ConceptBank) -> list[str]:
    """The names that loading passes over."""
    names = list(bank)
    return [name for name in names if name not in names[:: -(-len(names) // MOST_ENTRIES)]]


def is_read(bank: ConceptBank, name: str) -> bool:
    return "_entry" in vars(bank.entries.stored(name))


def test_loading_reads_no_increment_and_erasing_what_is_erased(folder, text_bank, pipe):
    small = text_bank.subset(["neon"])
    pipe.load_sepme(small)
    expected = latents(pipe, "neon cat", erased=["neon"])
    pipe.unload_sepme()
    bank = ConceptBank.from_pretrained(folder)
    assert not any(is_read(bank, name) for name in bank)
    pipe.load_sepme(bank)
    assert not any(is_read(bank, name) for name in bank)
    own = next(name for name in unsampled(bank) if name.startswith("neon"))
    assert torch.equal(latents(pipe, "neon cat", erased=[own]), expected)
    assert [name for name in bank if is_read(bank, name)] == [own]
    pipe.unload_sepme()


def test_an_increment_of_another_text_encoder_is_found_when_it_is_first_erased(folder, pipe):
    bank = ConceptBank.from_pretrained(folder)
    strange = unsampled(bank)[5]
    entry = bank[strange]
    torch.manual_seed(0)
    reading_all = Increment(torch.randn_like(entry.increment.A), B=entry.increment.B)
    bank = bank.with_entries([replace(entry, increment=reading_all)])
    pipe.load_sepme(bank)
    plain = latents(pipe, "neon cat", erased=[])
    with pytest.raises(ErasureNotInForce, match=f"'{strange}'.*text encoder has changed|text encoder.*'{strange}'"):
        latents(pipe, "neon cat", erased=[strange])
    assert torch.equal(latents(pipe, "neon cat", erased=[]), plain)
    assert not torch.equal(latents(pipe, "neon cat", erased=[unsampled(bank)[0]]), plain)
    pipe.unload_sepme()


def test_what_was_damaged_since_it_was_loaded_is_not_erased_in_silence(folder, pipe):
    pipe.load_sepme(folder)
    bank = pipe.get_bank()
    damaged = next(name for name in unsampled(bank) if name.startswith("cat"))
    record = bank.entries.stored(damaged).record
    (shard,) = folder.glob(record["shard"])
    data, first = shard.read_bytes(), record["rows"]["tokens"][0]
    with shard.open("r+b") as file:  # the very file that is held open
        header = 8 + int.from_bytes(data[:8], "little")
        file.seek(header + first * bank.base.width * torch.float32.itemsize)
        file.write(b"\x00\x01\x02\x03")
    pipe.set_erased(["neon 3"])
    before = latents(pipe, "neon cat")
    with pytest.raises(BankError, match=f"'{damaged}'.*damaged or was changed"):
        latents(pipe, "neon cat", erased=[damaged])
    assert pipe.erased == ("neon 3",)
    assert torch.equal(latents(pipe, "neon cat"), before)
    pipe.unload_sepme()
