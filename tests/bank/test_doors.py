"""What an increment does at further doors of the denoiser: on disk, on the Hub and back."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import hub
from folders import SHARD, manifest_of, reseal, same, shard_of, tree
from sepme_diffusers import BankError, BaseModel, ConceptBank, Increment, SepMETrainer
from sepme_diffusers.bank.checks.verify import verify
from sepme_diffusers.bank.compatibility import refuse_other_text
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.leakage import leakage
from sepme_diffusers.increment.peft_form import to_lora
from sepme_diffusers.text.encoding import encode_doors
from small import CLOSED, CONCEPTS, random_xl_pipeline
from tiny import PROJECTIONS, RANK, tiny_bank

POOLED = 12


@pytest.fixture
def bank() -> ConceptBank:
    """Both forms, each with an increment at a further door, one of these gated."""
    bank = tiny_bank()
    torch.manual_seed(1)
    gates = {"neon": None, "Van Gogh": 0.5}
    doors = {
        name: {"pooled": Increment(torch.randn(RANK + 1, POOLED), B=torch.randn(POOLED, RANK + 1), gate=gates[name])}
        for name in bank
    }
    entries = [replace(entry, increment=replace(entry.increment, doors=doors[name])) for name, entry in bank.items()]
    return replace(bank, base=with_door(bank.base, POOLED)).with_entries(entries)


def with_door(base: BaseModel, width: int | None) -> BaseModel:
    """The base with a pooled door of this width, or without one."""
    further = {} if width is None else {"pooled": Encoding(width)}
    return replace(base, doors={"tokens": base.doors["tokens"], **further})


@pytest.fixture
def saved(bank, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.mark.parametrize("compact", [False, True])
def test_disk_and_back_is_exact(compact, bank, tmp_path):
    bank = bank.compact() if compact else bank
    bank.save_pretrained(tmp_path)
    back = ConceptBank.from_pretrained(tmp_path)
    assert same(bank, back)
    assert back.base == bank.base
    for name, entry in bank.items():
        assert back[name].increment.doors["pooled"].gate == entry.increment.doors["pooled"].gate
    assert verify(tmp_path).ok


def test_tensors_stand_where_the_format_says(saved):
    names = ["pooled.A", "pooled.B", "tokens.A", "tokens.B"]
    assert sorted(load_file(shard_of(saved, "neon"))) == names
    modules = [f"tokens.C.{module}" for module in PROJECTIONS]
    assert sorted(load_file(shard_of(saved, "Van Gogh"))) == ["pooled.A", "pooled.B", "tokens.A", *modules]
    assert manifest_of(saved)["concepts"]["neon"]["rows"] == {"pooled": [0, RANK + 1], "tokens": [0, RANK]}


def test_a_part_of_an_increment_is_not_taken_for_the_whole(bank, saved):
    """A per-module increment is a LoRA that any tool may load. What it does at a further door would be left out."""
    assert not list(saved.glob("van-gogh*"))
    plain = replace(bank["Van Gogh"], increment=replace(bank["Van Gogh"].increment, doors={}))
    bank.with_entries([plain]).save_pretrained(saved)
    (folder,) = saved.glob("van-gogh*")
    assert {file.name for file in folder.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    with pytest.raises(ValueError, match=r"acts at the further doors \['pooled'\] is not a LoRA"):
        to_lora(bank["Van Gogh"].increment)


def test_other_precision_is_for_further_doors_too(bank, tmp_path):
    bank.save_pretrained(tmp_path, torch.float16)
    for entry in ConceptBank.from_pretrained(tmp_path).values():
        pooled = entry.increment.doors["pooled"]
        assert (pooled.A.dtype, pooled.B.dtype) == (torch.float32, torch.float16)


def test_a_bank_refuses_doors_that_its_base_lacks(bank):
    for width in (None, POOLED + 1):
        with pytest.raises(ValueError, match=r"the base has the doors .*differ: .*'neon': \{'pooled': 12\}"):
            replace(bank, base=with_door(bank.base, width))
    with pytest.raises(ValueError, match="a base has a door 'tokens'"):
        replace(bank.base, doors={"pooled": Encoding(POOLED)})


def test_a_base_with_doors_serves_increments_without(bank):
    plain = [replace(entry, increment=replace(entry.increment, doors={})) for entry in bank.values()]
    assert list(bank.with_entries(plain)) == list(bank)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["base"]["doors"].pop("pooled"), "acts at the door 'pooled', which the base lacks"),
        (lambda m: m["base"]["doors"].pop("tokens"), r"base\.doors"),
        (lambda m: m["base"]["doors"].update(Pooled=m["base"]["doors"]["pooled"]), r"base\.doors"),
        (lambda m: m["base"]["doors"]["pooled"].update(width=12.0), r"doors\.pooled\.width: 12\.0 is not written as"),
        (lambda m: m["base"]["doors"]["pooled"].update(width=2), "a rank of 3 is not from 1 to the width 2"),
        (lambda m: m["concepts"]["Van Gogh"]["gates"].update(pooled=0), "gates"),
        (lambda m: m["concepts"]["Van Gogh"].update(gates={"other": 1}), r"gates at the doors \['other'\], where"),
        (lambda m: m["concepts"]["neon"]["rows"].pop("tokens"), r"concepts\.neon"),
        (lambda m: m["concepts"]["neon"]["rows"].update(pooled=[1, 1]), "a rank of 0 is not"),
        (lambda m: m["concepts"]["neon"]["rows"].update(pooled=[2, 1]), "a rank of -1 is not"),
        (lambda m: m["concepts"]["neon"]["rows"].update(pooled=[0, 1.0]), r"rows\.pooled: 1\.0 is not written as an"),
    ],
)  # fmt: skip
def test_manifests_that_make_no_sense_are_refused(edit, message, saved):
    reseal(saved, edit)
    with pytest.raises(BankError, match=message):
        ConceptBank.from_pretrained(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m["base"]["doors"]["pooled"].update(width=POOLED + 1), "width 12 at the door 'pooled'"),
        (lambda m: m["concepts"]["neon"]["rows"].pop("pooled"), "damaged or was changed"),
        (lambda m: m["concepts"]["neon"]["rows"].update(pooled=[0, 2]), "damaged or was changed"),
        (lambda m: m["concepts"]["neon"]["rows"].update(pooled=[1, 4]), "does not hold the rows"),
        (lambda m: m["concepts"]["neon"]["rows"].update(pooled=[2**53 - 3, 2**53]), "does not hold the rows"),
    ],
)
def test_manifests_that_contradict_the_tensors_are_refused_when_these_are_read(edit, message, saved):
    reseal(saved, edit)
    bank = ConceptBank.from_pretrained(saved)
    with pytest.raises(BankError, match=f"'neon'.*{message}"):
        bank["neon"]
    assert any("'neon'" in fault for fault in verify(saved).faults)


def test_damage_is_found(saved):
    file = shard_of(saved, "Van Gogh")
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BankError, match=f"{file.name} is damaged or was changed"):
        ConceptBank.from_pretrained(saved)
    faults = verify(saved).faults
    assert any(f"{file.name} is damaged" in fault for fault in faults)
    assert not any("'neon'" in fault for fault in faults)


def test_the_hub_has_them_and_a_partial_pull_fetches_them(bank, tmp_path):
    with hub.running() as server:
        bank.push_to_hub("me/bank", endpoint=server.endpoint, token=hub.WRITER)
        place = {"endpoint": server.endpoint, "token": False, "cache_dir": tmp_path}
        assert same(ConceptBank.from_pretrained("me/bank", **place), bank)
        shards = {file for file in server.files("me/bank") if SHARD.fullmatch(file)}
        assert len(shards) == 2  # one for each form
        assert shards <= set(server.fetched)


def test_saving_again_changes_nothing(saved):
    before = tree(saved)
    ConceptBank.from_pretrained(saved).save_pretrained(saved)
    assert tree(saved) == before


@pytest.fixture(scope="module")
def xl():
    """SDXL at small size, and a bank that acts at both of its doors."""
    pipe = random_xl_pipeline()
    return pipe, SepMETrainer(pipe, replace(CLOSED, reserve=0.1)).erase(CONCEPTS)


def reading_a_guard(bank, pipe):
    """The bank with an increment that reads the blank prompt at the pooled door; among the tokens it is sound."""
    entry, blank = bank["neon"], encode_doors(pipe, [""])["pooled"][0]
    pooled = entry.increment.doors["pooled"]
    a = pooled.A + pooled.A.norm() * blank / blank.norm()
    increment = replace(entry.increment, doors={"pooled": replace(pooled, A=a)})
    return bank.with_entries([replace(entry, increment=increment)])


def test_a_guard_that_is_moved_at_a_further_door_is_found(xl):
    pipe, bank = xl
    assert verify(bank, pipe).ok
    report = verify(reading_a_guard(bank, pipe), pipe)
    assert report.faults[0].startswith("concept 'neon': it moves the guarded prompt '' by")
    assert all("concept 'neon': it moves the guarded" in fault for fault in report.faults)
    assert report.concepts["neon"].leakage > 1e-2


def test_another_encoder_of_a_further_door_is_refused(xl):
    """The tokens do not pass through the second encoder's projection, so they cannot tell."""
    pipe, bank = xl
    refuse_other_text(pipe, [bank])
    with pytest.raises(ValueError, match=r"another text encoder than this pipeline's.*'neon'"):
        refuse_other_text(pipe, [reading_a_guard(bank, pipe)])
    other = random_xl_pipeline()
    with torch.no_grad():
        other.text_encoder_2.text_projection.weight.normal_()
    with pytest.raises(ValueError, match="another text encoder than this pipeline's"):
        other.load_sepme(bank)


def test_a_pipeline_without_the_door_is_refused(text_bank, pipe):
    door = {"pooled": Increment(torch.ones(1, 64), torch.ones(64, 1))}
    entries = [replace(entry, increment=replace(entry.increment, doors=door)) for entry in text_bank.values()]
    bank = replace(text_bank, base=with_door(text_bank.base, 64)).with_entries(entries)
    for check in (lambda: refuse_other_text(pipe, [bank]), lambda: verify(bank, pipe)):
        with pytest.raises(ValueError, match=r"doors \['pooled'\], for which th.* pipeline has no embedding"):
            check()


def test_leakage_needs_the_embeddings_of_every_door(xl):
    pipe, bank = xl
    tokens, weights = encode_doors(pipe, [""])["tokens"], projection_weights(pipe.unet)
    with pytest.raises(ValueError, match=r"acts at the doors \['pooled'\], whose embeddings are needed"):
        leakage(bank["neon"].increment, tokens, weights)
