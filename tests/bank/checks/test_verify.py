import json
import os
import pickle
import re
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from folders import manifest_of, replace_shard, reseal, shard_of, tree
from sepme_diffusers import Concept, ConceptBank, GuardSet, Increment, SepMEPipeline, pocket
from sepme_diffusers.bank.checks import guards as measuring
from sepme_diffusers.bank.checks.verify import verify
from sepme_diffusers.bank.disk.folder import sha256
from sepme_diffusers.bank.disk.layout import MANIFEST
from sepme_diffusers.bank.rows import digest
from sepme_diffusers.cli import banks
from sepme_diffusers.cli.app import app
from small import random_pipeline

LORA, CONFIG = "woodcut/adapter_model.safetensors", "woodcut/adapter_config.json"


@pytest.fixture
def saved(mixed_bank, tmp_path) -> Path:
    mixed_bank.save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


def with_weights(folder: Path, edit) -> None:
    """Other numbers of the text-side concepts, sealed as a knowing tamperer would."""
    tensors = load_file(shard_of(folder, "neon"))
    edit(tensors)
    rows = {"neon": [0, 6], "cat": [6, 12]}
    assert all(manifest_of(folder)["concepts"][name]["rows"]["tokens"] == place for name, place in rows.items())
    replace_shard(folder, "neon", save(tensors), digest({name: part[:6] for name, part in tensors.items()}))


def test_a_sound_bank_has_no_fault(saved, mixed_bank, pipe):
    for bank in (saved, mixed_bank):
        report = verify(bank, pipe)
        assert report.ok, report.faults
        assert not report.notes
        assert list(report.concepts) == list(mixed_bank)
        assert all(found.leakage < 1e-5 and found.norm < 100 for found in report.concepts.values())


@pytest.mark.parametrize("file", [MANIFEST, "shard", LORA, CONFIG])
def test_any_flipped_byte_is_found(saved, file):
    file = shard_of(saved, "neon").name if file == "shard" else file
    data = (saved / file).read_bytes()
    for place in range(0, len(data), max(1, len(data) // 25)):
        (saved / file).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        report = verify(saved)
        assert any(file in fault for fault in report.faults), place
    (saved / file).write_bytes(data)
    assert verify(saved).ok


def rename(folder: Path) -> None:
    text = (folder / MANIFEST).read_text("utf-8")
    (folder / MANIFEST).write_text(text.replace('"woodcut":{', '"etching":{'), "utf-8")


def rename_and_seal(folder: Path) -> None:
    reseal(folder, lambda m: m["concepts"].update(etching=m["concepts"].pop("woodcut")))


def swap_records(manifest: dict) -> None:
    neon, cat = manifest["concepts"]["neon"], manifest["concepts"]["cat"]
    neon["rows"], cat["rows"] = cat["rows"], neon["rows"]


def link(folder: Path) -> None:
    shard = shard_of(folder, "neon")
    os.rename(shard, folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


def claim_terabytes(folder: Path) -> None:
    tensor = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    header = json.dumps({"tokens.A": tensor, "tokens.B": tensor}).encode()
    replace_shard(folder, "neon", struct.pack("<Q", len(header)) + header)


def look_alike(manifest: dict) -> None:
    manifest["concepts"]["nеon"] = manifest["concepts"].pop("cat")


def other_alpha(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_bytes())
    data = json.dumps(config | {"lora_alpha": 800}).encode()
    (folder / CONFIG).write_bytes(data)
    reseal(folder, lambda m: m["concepts"]["woodcut"]["files"].update({"adapter_config.json": sha256(data)}))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (rename, "its SHA-256 is not its digest"),
        (rename_and_seal, "'woodcut' is not named after it"),
        (lambda f: reseal(f, swap_records), "'neon'.* is damaged or was changed"),
        (lambda f: (f / "woodcut" / "more.safetensors").write_bytes(b""), "more.safetensors is not named"),
        (lambda f: (f / f"increments-{'0' * 16}.safetensors").write_bytes(b""), "0000.safetensors is not named"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(1)), "pytorch_model.bin is not named"),
        (lambda f: replace_shard(f, "neon", pickle.dumps([1])), "is no safetensors file"),
        (lambda f: with_weights(f, lambda t: t["tokens.B"].fill_(float("nan"))), "must be finite"),
        (lambda f: with_weights(f, lambda t: t["tokens.A"].fill_(float("inf"))), "must be finite"),
        (lambda f: with_weights(f, lambda t: t["tokens.B"][:6].mul_(1e4)), "its increment is huge"),
        (link, "symbolic link"),
        (lambda f: (f / "cats").symlink_to(f / "woodcut"), "cats is a symbolic link"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is not a plain file"),
        (lambda f: reseal(f, lambda m: m["concepts"]["woodcut"].update(folder="../x")), r"\$\.concepts\.woodcut"),
        (lambda f: reseal(f, lambda m: m["concepts"]["woodcut"].update(folder="/etc")), r"\$\.concepts\.woodcut"),
        (lambda f: reseal(f, lambda m: m["concepts"]["neon"].update(shard="a\0b/c")), r"\$\.concepts\.neon"),
        (lambda f: (f / "WOODCUT").mkdir(), r"\['WOODCUT', 'woodcut'\] for one name"),
        (lambda f: reseal(f, look_alike), "look alike: 'neon', 'nеon'"),
        (lambda f: (f / MANIFEST).write_text('{"format": "sepme_bank", "format": 1}'), "a key is given twice"),
        (lambda f: os.truncate(f / MANIFEST, 2**30), f"has {2**30} bytes"),
        (lambda f: (f / MANIFEST).write_text('{"a":' * 10_000 + "1" + "}" * 10_000), "not JSON"),
        (lambda f: (f / MANIFEST).unlink(), "it has no sepme_bank.json"),
        (claim_terabytes, "is no safetensors file to other readers"),
        (lambda f: os.truncate(shard_of(f, "neon"), 2**42), f"has {2**42} bytes"),
        (lambda f: shard_of(f, "neon").unlink(), r"increments-.*\.safetensors is missing"),
        (lambda f: shutil.rmtree(f / "woodcut"), r"woodcut/adapter_model\.safetensors is missing"),
        (lambda f: (f / CONFIG).unlink(), "adapter_config.json is missing"),
        (other_alpha, r"tells other tools something else than the manifest: \['lora_alpha'\]"),
        (lambda f: reseal(f, lambda m: m["concepts"]["neon"]["metrics"].pop("leakage")), r"metrics\.leakage"),
        (lambda f: reseal(f, lambda m: m["concepts"]["neon"]["rows"].update(tokens=[0, 5])), "damaged or was changed"),
        (lambda f: reseal(f, lambda m: m["concepts"]["woodcut"].update(rank=9)), "rank 8, not 9"),
        (lambda f: reseal(f, lambda m: m["base"]["projections"].popitem()), "other modules or heights"),
        (lambda f: reseal(f, lambda m: m.update(version=6)), "version 6"),
    ],
)  # fmt: skip
def test_tampering_is_found(saved, tamper, message):
    assert verify(saved).ok
    tamper(saved)
    faults = "\n".join(verify(saved).faults)
    assert re.search(message, faults), faults


def shaken(factor: torch.Tensor, by: float = 0.01) -> torch.Tensor:
    return factor + by * torch.randn(factor.shape, generator=torch.Generator().manual_seed(0))


def test_an_increment_that_breaks_its_guard_is_found_by_the_text_encoder_alone(mixed_bank, saved, pipe):
    """Its files are in order; only recomputing the guards gives it away, and names each prompt that moves."""
    entry = mixed_bank["neon"]
    broken = replace(entry, increment=Increment(shaken(entry.increment.A), B=entry.increment.B))
    mixed_bank.with_entries([broken]).save_pretrained(saved)
    assert verify(saved).ok
    report = verify(saved, pipe)
    moved = [fault for fault in report.concepts["neon"].faults if "it moves the guarded prompt" in fault]
    assert len(moved) == len(entry.guards)
    assert report.concepts["neon"].leakage > 1e-3
    assert all(not found.faults for name, found in report.concepts.items() if name != "neon")


def test_a_leak_that_the_bank_owns_up_to_is_no_fault(mixed_bank, pipe):
    entry = mixed_bank["neon"]
    leaky = replace(entry, increment=Increment(shaken(entry.increment.A), B=entry.increment.B))
    measured = verify(mixed_bank.with_entries([leaky]), pipe).concepts["neon"].leakage
    owned = replace(leaky, metrics={"leakage": measured, "leakage_of": dict.fromkeys(entry.guards, measured)})
    # No pipeline loads it all the same: none of its guards is exact.
    (fault,) = verify(mixed_bank.with_entries([owned]), pipe).faults
    assert "it guards no prompt exactly" in fault
    meek = replace(leaky, metrics={"leakage": measured, "leakage_of": dict.fromkeys(entry.guards, measured / 10)})
    assert any(
        "it moves the guarded prompt" in fault for fault in verify(mixed_bank.with_entries([meek]), pipe).faults
    )


def test_a_bank_that_no_pipeline_would_load_is_not_ok(text_bank, pipe):
    """Verified alone or with its own base: every guard is excused from the check of the text encoder."""
    entry = text_bank["neon"]
    excused = replace(entry, metrics={"leakage": 0.0, "leakage_of": dict.fromkeys(entry.guards, 0.0)})
    for base in (None, pipe):
        (fault,) = verify(text_bank.with_entries([excused]), base).faults
        assert "'neon'" in fault
        assert "it guards no prompt exactly" in fault


def test_another_base_is_found(mixed_bank, text_bank, pocket_pipe):
    assert any("other weights" in fault for fault in verify(mixed_bank, pocket_pipe).folder)
    # Text-side increments fit any UNet of the width; the text encoder is what they are bound to.
    moved = verify(text_bank, random_pipeline(text_seed=1))
    assert all(found.faults for found in moved.concepts.values())
    assert verify(text_bank, random_pipeline(seed=1)).ok


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_told_from_a_broken_guard(dtype, text_bank):
    pipe = random_pipeline().to(dtype)
    sound = verify(text_bank, pipe)
    assert sound.ok
    assert any("load it in float32" in note for note in sound.notes)
    assert pipe.text_encoder.dtype == dtype
    entry = text_bank["neon"]
    broken = replace(entry, increment=Increment(shaken(entry.increment.A, 0.002), B=entry.increment.B))
    report = verify(text_bank.with_entries([broken]), pipe)
    assert 0.02 < report.concepts["neon"].leakage < 0.125
    assert "it moves the guarded prompt" in report.concepts["neon"].faults[0]


def test_weights_that_half_precision_holds_are_checked_as_in_float32(pocket_pipe):
    """The built-in model was saved in float16: nothing was rounded, so nothing is excused."""
    pipe = SepMEPipeline.from_pretrained(pocket.path(), torch_dtype=torch.float16)
    report = verify(pocket.bank("styles"), pipe)
    assert report.ok
    assert not report.notes
    assert max(found.leakage for found in report.concepts.values()) < 1e-5


def test_a_folder_that_is_no_bank_is_not_walked(tmp_path, monkeypatch):
    """It may be the root of a disk."""
    folder = tmp_path / "home"
    (folder / "deep" / "deeper").mkdir(parents=True)
    walked = []
    monkeypatch.setattr(os, "walk", lambda *args, **options: walked.append(args) or iter(()))
    for text in (None, "{}", "[]"):
        if text is not None:
            (folder / MANIFEST).write_text(text)
        report = verify(folder)
        assert len(report.faults) == 1
        assert not report.concepts
    assert walked == []


def test_every_fault_is_listed_at_once(saved, pipe):
    (saved / "woodcut" / "adapter_config.json").write_text("{}")
    (saved / "stray.txt").write_text("")
    with_weights(saved, lambda tensors: tensors["tokens.B"].mul_(1e6))
    reseal(saved, lambda m: m["concepts"]["neon"]["metrics"].clear())
    faults = verify(saved, pipe).faults
    for words in ("adapter_config.json is damaged", "stray.txt", "'cat'.*changed", "neon.*huge", "metrics.leakage"):
        assert any(re.search(words, fault) for fault in faults), words


def test_what_a_damaged_shard_holds_is_named(mixed_bank, saved):
    """Every concept in it, and no other."""
    more = replace(mixed_bank["neon"], concept=Concept("oil"))
    mixed_bank.with_entries([more]).save_pretrained(saved)
    shard_of(saved, "neon").write_bytes(b"")
    faults = verify(saved).concepts
    assert [name for name, found in faults.items() if found.faults] == ["neon", "cat", "pencil"]


@pytest.mark.parametrize("name", ["styles", "objects"])
def test_the_shipped_banks_are_sound(name, pocket_pipe):
    report = verify(Path(pocket.__file__).parent / "banks" / name, pocket_pipe)
    assert report.ok, report.faults
    assert not report.notes


def test_what_people_keep_beside_a_bank_is_let_be(saved):
    for name in (".gitattributes", "LICENSE", "before.png"):
        (saved / name).write_bytes(b"")
    (saved / ".git").mkdir()
    (saved / ".git" / "config").write_bytes(b"")
    assert verify(saved).ok


def test_verifying_changes_nothing(saved, pipe):
    before = tree(saved)
    verify(saved, pipe)
    assert tree(saved) == before


def test_the_command_line_prints_one_table_and_exits_by_it(saved, monkeypatch):
    monkeypatch.setattr(banks, "console", Console(width=300))
    sound = CliRunner().invoke(app, ["verify", str(saved)])
    assert sound.exit_code == 0, sound.output
    assert "No faults" in sound.output
    assert "guards and base were not checked" in sound.output
    shard_of(saved, "neon").write_bytes(b"")
    (saved / "[red]stray\x1b[2J").write_text("")
    faulty = CliRunner().invoke(app, ["verify", str(saved)])
    assert faulty.exit_code == 1
    assert "SHA-256 is not the manifest's" in faulty.output
    assert "[red]stray?[2J" in faulty.output
    assert "5 faults" in faulty.output  # the stray file, the shard, and the three concepts in it


def test_the_command_line_takes_a_base(tmp_path, mixed_bank):
    SepMEPipeline.from_pretrained(pocket.path()).save_pretrained(tmp_path / "base")
    mixed_bank.save_pretrained(tmp_path / "bank")
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "bank"), "--base", str(tmp_path / "base")])
    assert shown.exit_code == 1
    assert "other weights" in " ".join(shown.output.split())


def test_a_sample_measures_the_guards_of_some_concepts(text_bank, pipe):
    """Which ones is chance, so that nobody can hide behind it; a fault that all have is found in any sample."""
    names = [f"{name} {number}" for name in text_bank for number in range(10)]
    moving = [
        replace(entry, increment=replace(entry.increment, A=shaken(entry.increment.A)))
        for entry in (text_bank[name.split()[0]].renamed(name) for name in names)
    ]
    bank = ConceptBank(text_bank.base).with_entries(moving)
    seen = [{name for name, found in verify(bank, pipe, sample=4).concepts.items() if found.faults} for _ in range(5)]
    assert {len(faulty) for faulty in seen} == {4}
    assert len(set().union(*seen)) > 4
    whole = verify(bank, pipe)
    assert all(found.faults for found in whole.concepts.values())
    assert not any("at random" in note for note in whole.notes)
    assert any("4 concepts" in note for note in verify(bank, pipe, sample=4).notes)
    with pytest.raises(ValueError, match="at least 1, not 0"):
        verify(bank, pipe, sample=0)


def test_a_sample_looks_at_what_the_bank_says_is_moved(text_bank, pipe, monkeypatch):
    """Of damped guards some are measured, and always those that are listed."""
    names = [f"name {number}" for number in range(50)]
    entry = text_bank["neon"]
    listed = replace(
        entry, guard_set=GuardSet(("",), tuple(names)), metrics={"leakage": 0.1, "leakage_of": {"name 7": 0.1}}
    )
    measured = []
    encode = measuring.encode_doors
    monkeypatch.setattr(
        measuring, "encode_doors", lambda pipe, prompts: measured.append(prompts) or encode(pipe, prompts)
    )
    verify(ConceptBank(text_bank.base).with_entries([listed]), pipe, sample=2)
    assert {"", "name 7"} <= set(measured[-1])
    assert len(measured[-1]) <= 4


def test_the_command_line_packs_a_bank(text_bank, tmp_path):
    folder = tmp_path / "bank"
    for size in range(1, 4):
        text_bank.subset(list(text_bank)[:size]).save_pretrained(folder)
    assert len(list(folder.glob("increments-*"))) == 3
    shown = CliRunner().invoke(app, ["pack", str(folder)])
    assert shown.exit_code == 0, shown.output
    assert len(list(folder.glob("increments-*"))) == 1
    assert ConceptBank.from_pretrained(folder).digest == text_bank.digest
