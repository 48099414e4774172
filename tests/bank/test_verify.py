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
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from folders import reseal, tree
from sepme_diffusers import ConceptBank, Increment, SepMEPipeline, pocket
from sepme_diffusers.bank.folder import sha256
from sepme_diffusers.bank.layout import MANIFEST
from sepme_diffusers.bank.verify import verify
from sepme_diffusers.cli import banks
from sepme_diffusers.cli.app import app
from small import random_pipeline

TEXT, LORA, CONFIG = (
    "neon/text_increment.safetensors", "woodcut/adapter_model.safetensors", "woodcut/adapter_config.json"
)  # fmt: skip


@pytest.fixture
def saved(mixed_bank, tmp_path) -> Path:
    mixed_bank.save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


def with_weights(folder: Path, edit) -> None:
    """Other weights of "neon", sealed as a knowing tamperer would."""
    tensors = load_file(folder / TEXT)
    edit(tensors)
    save_file(tensors, folder / TEXT)
    with_bytes(folder, (folder / TEXT).read_bytes())


def with_bytes(folder: Path, data: bytes) -> None:
    (folder / TEXT).write_bytes(data)
    reseal(folder, lambda m: m["concepts"]["neon"].update(sha256=sha256(data)))


def test_a_sound_bank_has_no_fault(saved, mixed_bank, pipe):
    for bank in (saved, mixed_bank):
        report = verify(bank, pipe)
        assert report.ok, report.faults
        assert not report.notes
        assert list(report.concepts) == list(mixed_bank)
        assert all(found.leakage < 1e-5 and found.norm < 100 for found in report.concepts.values())


@pytest.mark.parametrize("file", [MANIFEST, TEXT, LORA, CONFIG])
def test_any_flipped_byte_is_found(saved, file):
    data = (saved / file).read_bytes()
    for place in range(0, len(data), max(1, len(data) // 25)):
        (saved / file).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        report = verify(saved)
        assert any(file in fault for fault in report.faults), place
    (saved / file).write_bytes(data)
    assert verify(saved).ok


def rename(folder: Path) -> None:
    text = (folder / MANIFEST).read_text("utf-8")
    (folder / MANIFEST).write_text(text.replace('"woodcut": {', '"etching": {'), "utf-8")


def rename_and_seal(folder: Path) -> None:
    reseal(folder, lambda m: m["concepts"].update(etching=m["concepts"].pop("woodcut")))


def swap(folder: Path) -> None:
    other = folder / "cat" / "text_increment.safetensors"
    neon, cat = (folder / TEXT).read_bytes(), other.read_bytes()
    (folder / TEXT).write_bytes(cat)
    other.write_bytes(neon)


def swap_records(manifest: dict) -> None:
    neon, cat = manifest["concepts"]["neon"], manifest["concepts"]["cat"]
    for key in ("file", "sha256"):
        neon[key], cat[key] = cat[key], neon[key]


def link(folder: Path) -> None:
    os.rename(folder / TEXT, folder.parent / "elsewhere")
    (folder / TEXT).symlink_to(folder.parent / "elsewhere")


def claim_terabytes(folder: Path) -> None:
    tensor = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
    header = json.dumps({"A": tensor}).encode()
    with_bytes(folder, struct.pack("<Q", len(header)) + header)


def look_alike(manifest: dict) -> None:
    manifest["concepts"]["nеon"] = manifest["concepts"].pop("cat")


def other_alpha(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_bytes())
    data = json.dumps(config | {"lora_alpha": 800}).encode()
    (folder / CONFIG).write_bytes(data)
    reseal(folder, lambda m: m["concepts"]["woodcut"]["beside"].update({"adapter_config.json": sha256(data)}))


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (rename, "its SHA-256 is not its digest"),
        (rename_and_seal, "'woodcut' is not named after it"),
        (swap, "SHA-256 is not the manifest's"),
        (lambda f: reseal(f, swap_records), "not named after it"),
        (lambda f: (f / "neon" / "more.safetensors").write_bytes(b""), "more.safetensors is not named"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(1)), "pytorch_model.bin is not named"),
        (lambda f: with_bytes(f, pickle.dumps([1])), "holds no increment"),
        (lambda f: with_weights(f, lambda t: t["B"].fill_(float("nan"))), "must be finite"),
        (lambda f: with_weights(f, lambda t: t["A"].fill_(float("inf"))), "must be finite"),
        (lambda f: with_weights(f, lambda t: t["B"].mul_(1e4)), "its increment is huge"),
        (link, "symbolic link"),
        (lambda f: (f / "cats").symlink_to(f / "cat"), "cats is a symbolic link"),
        (lambda f: os.mkfifo(f / "pipe"), "pipe is not a plain file"),
        (lambda f: reseal(f, lambda m: m["concepts"]["neon"].update(file="../neon/x")), "not a file of a concept's"),
        (lambda f: reseal(f, lambda m: m["concepts"]["neon"].update(file="/etc/passwd")), "not a file of a concept's"),
        (lambda f: reseal(f, lambda m: m["concepts"]["neon"].update(file="")), "not a file of a concept's"),
        (lambda f: reseal(f, lambda m: m["concepts"]["neon"].update(file="a\0b/c")), "not a file of a concept's"),
        (lambda f: (f / "NEON").mkdir(), r"\['NEON', 'neon'\] for one name"),
        (lambda f: reseal(f, look_alike), "look alike: 'neon', 'nеon'"),
        (lambda f: (f / MANIFEST).write_text('{"format": "sepme_bank", "format": 1}'), "a key is given twice"),
        (lambda f: os.truncate(f / MANIFEST, 2**30), f"has {2**30} bytes"),
        (lambda f: (f / MANIFEST).write_text('{"a":' * 10_000 + "1" + "}" * 10_000), "not JSON"),
        (lambda f: (f / MANIFEST).unlink(), "it has no sepme_bank.json"),
        (claim_terabytes, "holds no increment"),
        (lambda f: os.truncate(f / TEXT, 2**42), f"has {2**42} bytes"),
        (lambda f: shutil.rmtree(f / "cat"), "cat/text_increment.safetensors is missing"),
        (lambda f: (f / CONFIG).unlink(), "adapter_config.json is missing"),
        (other_alpha, r"tells other tools something else than the manifest: \['lora_alpha'\]"),
        (lambda f: reseal(f, lambda m: m["concepts"]["neon"]["metrics"].pop("leakage")), r"metrics\.leakage"),
        (lambda f: reseal(f, lambda m: m["concepts"]["neon"].update(rank=5)), "rank 6, not 5"),
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
    shutil.rmtree(saved / "cat")
    with_weights(saved, lambda tensors: tensors["B"].mul_(1e6))
    reseal(saved, lambda m: m["concepts"]["pencil"]["metrics"].clear())
    faults = verify(saved, pipe).faults
    for words in ("adapter_config.json is damaged", "stray.txt", "cat/text_increment", "huge", "metrics.leakage"):
        assert any(words in fault for fault in faults), words
    with pytest.raises(ValueError, match=r"missing|SHA-256"):
        ConceptBank.from_pretrained(saved)


@pytest.mark.parametrize("name", ["styles", "objects"])
def test_the_shipped_banks_are_sound(name, pocket_pipe):
    report = verify(Path(pocket.__file__).parent / "banks" / name, pocket_pipe)
    assert report.ok, report.faults
    assert not report.notes


def test_a_bank_of_version_1_is_checked_as_far_as_it_goes():
    report = verify(Path(__file__).parents[1] / "fixtures" / "bank-version-1")
    assert report.ok
    assert any("version 1 has no digest" in note for note in report.notes)


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
    (saved / TEXT).write_bytes(b"")
    (saved / "[red]stray\x1b[2J").write_text("")
    faulty = CliRunner().invoke(app, ["verify", str(saved)])
    assert faulty.exit_code == 1
    assert "SHA-256 is not the manifest's" in faulty.output
    assert "[red]stray?[2J" in faulty.output
    assert "2 faults" in faulty.output


def test_the_command_line_takes_a_base(tmp_path, mixed_bank):
    SepMEPipeline.from_pretrained(pocket.path()).save_pretrained(tmp_path / "base")
    mixed_bank.save_pretrained(tmp_path / "bank")
    shown = CliRunner().invoke(app, ["verify", str(tmp_path / "bank"), "--base", str(tmp_path / "base")])
    assert shown.exit_code == 1
    assert "other weights" in " ".join(shown.output.split())
