import copy
import pickle
import shutil
from dataclasses import replace

import pytest
import torch

from folders import same
from sepme_diffusers import Concept, ConceptBank
from sepme_diffusers.bank.disk.store import Store
from sepme_diffusers.bank.entries import Entries
from tiny import tiny_bank


@pytest.fixture
def saved(tmp_path):
    tiny_bank().save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The concepts whose numbers are read."""
    read, seen = Store.increment, []
    monkeypatch.setattr(Store, "increment", lambda self, name: (seen.append(name), read(self, name))[1])
    return seen


def test_entries_are_a_mapping_that_does_not_change():
    bank = tiny_bank()
    entries = bank.entries
    assert list(entries) == ["neon", "Van Gogh"]
    assert len(entries) == 2
    assert "neon" in entries
    assert "noen" not in entries
    assert entries["neon"] is bank["neon"]
    with pytest.raises(KeyError):
        entries["noen"]
    oil = Concept("oil")
    more = entries.joined_by([copy.copy(bank["neon"]), type(bank["neon"])(**{**vars(bank["neon"]), "concept": oil})])
    assert list(more) == ["neon", "Van Gogh", "oil"]
    assert list(entries) == ["neon", "Van Gogh"]
    assert list(more.only(["oil", "neon", "ghost"])) == ["neon", "oil"]
    assert Entries(entries) == entries
    assert Entries({}) != entries


def test_the_names_by_which_prompts_spell_a_concept_are_known_without_its_numbers(tmp_path, reads):
    bank = tiny_bank()
    concept = replace(bank["neon"].concept, aliases=("neon glow", "bright"), spelled=("neon", "neon glow"))
    bank = bank.with_entries([replace(bank["neon"], concept=concept)])
    bank.save_pretrained(tmp_path / "bank")
    outlines = ConceptBank.from_pretrained(tmp_path / "bank").entries.outlines()
    assert {name: outline.spellings for name, outline in outlines.items()} == {
        "neon": ("neon", "neon glow"),
        "Van Gogh": ("Van Gogh",),
    }
    assert reads == []


def test_nothing_is_read_until_somebody_asks_and_then_once(saved, reads):
    bank = ConceptBank.from_pretrained(saved)
    more = bank.subset(["neon", "Van Gogh"]).with_entries([])
    assert (repr(bank), bank._repr_html_(), bank.digest, dict(bank.guarantees)) is not None
    assert list(more) == list(bank)
    more.save_pretrained(saved)
    more.save_pretrained(saved.parent / "metrics alone", pack=False)  # a new folder needs every number
    assert sorted(reads) == ["Van Gogh", "neon"]
    assert bank["neon"] is bank["neon"] is more["neon"]
    assert len(reads) == 2


def test_outlines_say_what_the_entries_do(saved, reads):
    bank, original = ConceptBank.from_pretrained(saved), tiny_bank()
    for name, outline in bank.entries.outlines().items():
        entry = original[name]
        assert bank.entries.stored(name) is outline
        assert original.entries.stored(name) is None
        for what in ("form", "ranks", "gates", "metrics", "digest"):
            assert getattr(outline, what) == getattr(entry, what), what
        assert list(outline.guards) == list(entry.guards)
        assert outline.guards.set == entry.guard_set
        assert outline.bases.keys() == entry.bases.keys() == entry.ranks.keys()
        assert all(torch.equal(outline.bases[door], a) for door, a in entry.bases.items())
    assert reads == []
    assert torch.equal(bank.entries.outline("neon").increment.A, original["neon"].increment.A)
    assert reads == ["neon"]
    assert bank.entries.in_memory() == {}
    assert list(original.entries.in_memory()) == list(original)


@pytest.mark.parametrize("copied", [lambda bank: pickle.loads(pickle.dumps(bank)), copy.deepcopy, copy.copy])
def test_a_loaded_bank_is_copied_with_its_numbers(saved, copied):
    """Another process may not have the files; and what was looked up before does not matter."""
    bank = ConceptBank.from_pretrained(saved)
    assert len(bank.guarantees) == 3
    twin, digest = copied(bank), bank.digest
    shutil.rmtree(saved)
    assert same(twin, tiny_bank())
    assert twin.digest == digest
    assert dict(twin.guarantees) == dict(bank.guarantees)
    assert (twin.base, twin.always) == (bank.base, bank.always)


def test_a_part_of_a_loaded_bank_is_copied_too(saved):
    entries = ConceptBank.from_pretrained(saved).entries
    for twin in (copy.deepcopy(entries), pickle.loads(pickle.dumps(entries))):
        assert torch.equal(twin["neon"].increment.B, entries["neon"].increment.B)
        assert twin.outline("neon").digest == entries.outline("neon").digest
