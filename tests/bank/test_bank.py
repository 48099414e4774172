import itertools
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from filelock import FileLock
from huggingface_hub.errors import RepositoryNotFoundError
from peft import PeftModel
from PIL import Image

from folders import reseal, same, tree
from hub import serving
from sepme_diffusers import (
    BankError,
    BaseModel,
    Concept,
    ConceptBank,
    Entry,
    Increment,
    Picture,
    PolicyError,
    SepMEConfig,
    SepMETrainer,
)
from sepme_diffusers.algebra.subspace import leakage
from sepme_diffusers.bank.layout import LOCK, MANIFEST
from sepme_diffusers.bank.verify import verify
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.text.encoding import encode, rows
from small import CLOSED, CONCEPTS, latents, random_pipeline


@pytest.fixture
def saved(mixed_bank, tmp_path) -> Path:
    mixed_bank.save_pretrained(tmp_path / "bank")
    return tmp_path / "bank"


def test_disk_and_back_is_exact(mixed_bank, saved):
    back = ConceptBank.from_pretrained(saved)
    assert same(mixed_bank, back)
    assert (back.base, back.always) == (mixed_bank.base, mixed_bank.always)


def test_layout_is_the_documented_one(saved):
    assert set(tree(saved)) == {
        "sepme_bank.json", "README.md", "neon/text_increment.safetensors", "cat/text_increment.safetensors",
        "pencil/text_increment.safetensors", "woodcut/adapter_model.safetensors", "woodcut/adapter_config.json",
    }  # fmt: skip


def test_half_precision_keeps_the_basis_exact(mixed_bank, tmp_path):
    mixed_bank.save_pretrained(tmp_path / "bank", dtype=torch.float16)
    back = ConceptBank.from_pretrained(tmp_path / "bank")
    for name, entry in mixed_bank.items():
        assert torch.equal(back[name].increment.A, entry.increment.A)
        factors = back[name].increment.tensors()
        assert all(tensor.dtype == torch.float16 for key, tensor in factors.items() if key != "A")


def test_saving_again_changes_no_byte(mixed_bank, saved):
    before = tree(saved)
    times = {file: os.stat(saved / file).st_mtime_ns for file in before if "/" in file}
    ConceptBank.from_pretrained(saved).save_pretrained(saved)
    assert tree(saved) == before
    assert times == {file: os.stat(saved / file).st_mtime_ns for file in times}


def test_adding_a_concept_leaves_the_others_files_alone(text_bank, mixed_bank, tmp_path):
    text_bank.save_pretrained(tmp_path / "bank")
    before = tree(tmp_path / "bank")
    mixed_bank.save_pretrained(tmp_path / "bank")
    after = tree(tmp_path / "bank")
    assert all(after[file] == data for file, data in before.items() if "/" in file)
    assert "woodcut/adapter_model.safetensors" in after


def test_removed_and_replaced_concepts_leave_nothing_behind(mixed_bank, saved):
    increment = mixed_bank["neon"].increment
    stronger = replace(mixed_bank["neon"], increment=Increment(increment.A, B=increment.B * 2))
    bank = mixed_bank.subset(["neon", "pencil"]).with_entries([stronger])
    bank.save_pretrained(saved)
    assert same(bank, ConceptBank.from_pretrained(saved))
    assert len([file for file in tree(saved) if "/" in file]) == 2


def test_names_with_one_slug_do_not_collide(text_bank, tmp_path):
    entry = text_bank["neon"]
    twins = [replace(entry, concept=Concept(name, entry.concept.pairs)) for name in ("Neon!", "neon?")]
    bank = text_bank.with_entries(twins)
    bank.save_pretrained(tmp_path / "bank")
    assert same(bank, ConceptBank.from_pretrained(tmp_path / "bank"))


@pytest.mark.parametrize("loader", ["peft", "diffusers"])
def test_a_trained_concept_is_a_plain_lora(loader, pipe, mixed_bank, saved):
    """Loaders that know nothing of this package reproduce the erasure."""
    plain = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    original = latents(plain, "woodcut cat")
    if loader == "peft":
        unet = UNet2DConditionModel.from_config(pipe.unet.config)
        unet.load_state_dict(pipe.unet.state_dict())
        plain.unet = PeftModel.from_pretrained(unet, saved / "woodcut").get_base_model()
    else:
        plain.unet.load_lora_adapter(
            saved / "woodcut", prefix="base_model.model", weight_name="adapter_model.safetensors"
        )
    theirs = latents(plain, "woodcut cat")
    if loader == "diffusers":
        plain.unet.unload_lora()
    pipe.load_sepme(mixed_bank)
    pipe.set_erased(["woodcut"])
    ours = latents(pipe, "woodcut cat")
    assert (original - ours).abs().max() > 1e-3
    # Untrained latents grow to thirty or more; float32 rounding grows with them.
    assert (theirs - ours).abs().max() < 1e-5 * ours.abs().max()


def test_some_concepts_of_a_folder(mixed_bank, saved):
    """Damage elsewhere in the bank does not matter to them, and order stays the bank's."""
    (saved / "cat" / "text_increment.safetensors").unlink()
    some = ConceptBank.from_pretrained(saved, concepts=["woodcut", "neon"])
    assert same(some, mixed_bank.subset(["neon", "woodcut"]))
    with pytest.raises(KeyError, match=r"\['ghost'\].*'neon'"):
        ConceptBank.from_pretrained(saved, concepts=["neon", "ghost"])
    with pytest.raises(TypeError, match=r"\['neon'\]"):
        ConceptBank.from_pretrained(saved, concepts="neon")


def test_some_concepts_must_include_those_of_the_policy(text_bank, tmp_path):
    replace(text_bank, always=("cat",)).save_pretrained(tmp_path / "bank")
    with pytest.raises(ValueError, match=r"always erases \['cat'\]"):
        ConceptBank.from_pretrained(tmp_path / "bank", concepts=["neon"])
    assert list(ConceptBank.from_pretrained(tmp_path / "bank", concepts=["neon", "cat"])) == ["neon", "cat"]


def test_a_bank_in_a_subfolder(mixed_bank, saved):
    assert same(ConceptBank.from_pretrained(saved.parent, subfolder=saved.name), mixed_bank)


def test_proxies_are_refused_with_the_way_to_set_them(saved):
    with pytest.raises(ValueError, match="HTTPS_PROXY"):
        ConceptBank.from_pretrained(saved, proxies={"https": "http://proxy"})


def test_guarantees_say_what_holds_for_each_prompt(pipe, text_bank, mixed_bank):
    promised = text_bank.guarantees
    assert set(promised) == {"", "watermark", "neon", "cat", "pencil"}
    assert all(promise.exact for promise in promised.values())
    later = mixed_bank.guarantees
    assert later["watermark"].exact
    assert not later["woodcut"].exact
    assert later["woodcut"].unaware == ("neon", "cat", "pencil")


def test_a_loose_guard_promises_its_measured_leakage_and_no_more(pipe):
    """A tolerance that leaves directions out: what the prompts then leak is measured, kept, and told."""
    config = replace(CLOSED, guard_tolerance=0.1)
    bank = SepMETrainer(pipe, config, guards=["watermark"]).erase(CONCEPTS[:1])
    promise = bank.guarantees["watermark"]
    assert not promise.exact
    weights = projection_weights(pipe.unet)
    deltas = bank["neon"].increment.delta_weights(weights)
    tokens = rows(encode(pipe, ["watermark"]))
    measured = max(float(leakage(tokens, delta, weights[name]).max()) for name, delta in deltas.items())
    assert promise.leakage == pytest.approx(measured, rel=0.01)


def test_damage_is_found_and_named(saved):
    file = saved / "neon" / "text_increment.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BankError, match=r"'neon'.*damaged or was changed"):
        ConceptBank.from_pretrained(saved)


def test_missing_file_is_named(saved):
    shutil.rmtree(saved / "cat")
    with pytest.raises(BankError, match=r"cat.text_increment.safetensors is missing"):
        ConceptBank.from_pretrained(saved)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x/y.safetensors", "neon/../../y", "a/b/c", "neon\\x/y", "neon"])
def test_a_manifest_cannot_lead_out_of_the_folder(saved, path):
    reseal(saved, lambda m: m["concepts"]["neon"].update(file=path))
    with pytest.raises(BankError, match="not a file of a concept's folder"):
        ConceptBank.from_pretrained(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=99), "version 99.*Upgrade"),
        (lambda m: m.update(format="zip"), "not the manifest of a concept bank"),
        (lambda m: m.pop("base"), "not a valid bank manifest.*base"),
        (lambda m: m["concepts"]["neon"]["config"].update(speed=1), "speed"),
        (lambda m: m["policy"].update(always=["ghost"]), "ghost"),
        (lambda m: m.update(concepts=3), "not a valid bank manifest"),
    ],
)
def test_bad_manifests_are_refused(saved, edit, message):
    reseal(saved, edit)
    with pytest.raises(BankError, match=message):
        ConceptBank.from_pretrained(saved)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "sepme_bank", "format": "sepme_bank"}', "[" * 100_000])
def test_broken_json_is_refused(saved, text):
    (saved / MANIFEST).write_text(text)
    with pytest.raises(BankError, match=MANIFEST):
        ConceptBank.from_pretrained(saved)


def test_other_peoples_folders_are_not_overwritten(text_bank, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BankError, match="not empty and holds no concept bank"):
        text_bank.save_pretrained(tmp_path)
    assert tree(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(BankError, match="no concept bank"):
        ConceptBank.from_pretrained(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_killed_save_leaves_the_old_bank_or_the_new_one(text_bank, mixed_bank, tmp_path):
    """Saving stops dead before each of its file operations in turn; every time a whole bank is there."""
    for stop, survivor in ((1, text_bank), (2, text_bank), (3, mixed_bank), (4, mixed_bank)):
        shutil.rmtree(tmp_path / "bank", ignore_errors=True)
        text_bank.save_pretrained(tmp_path / "bank")
        assert code_of_a_save_that_dies(mixed_bank, tmp_path / "bank", stop) == (0 if stop == 4 else -signal.SIGKILL)
        assert same(ConceptBank.from_pretrained(tmp_path / "bank"), survivor)
        mixed_bank.save_pretrained(tmp_path / "bank")
        assert not list((tmp_path / "bank").glob(".*"))
        assert same(ConceptBank.from_pretrained(tmp_path / "bank"), mixed_bank)


def code_of_a_save_that_dies(bank, folder, stop):
    """Save in a forked process that is killed before it replaces a file for the `stop`-th time."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        replaced, real = itertools.count(1), os.replace

        def replace_or_die(*paths):
            if next(replaced) == stop:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*paths)

        os.replace = replace_or_die
        bank.save_pretrained(folder)
        os._exit(0)
    finally:
        os._exit(1)


def test_unknown_concept_is_named_with_what_there_is(text_bank):
    with pytest.raises(KeyError, match=r"'noen'.*'neon'"):
        text_bank["noen"]


def test_a_bank_refuses_names_that_look_alike_and_increments_of_other_modules(text_bank, mixed_bank):
    entry = text_bank["neon"]
    with pytest.raises(ValueError, match=r"tell apart.*'Neon'"):
        text_bank.with_entries([replace(entry, concept=Concept("Neon", entry.concept.pairs))])
    trained = mixed_bank["woodcut"]
    part = Increment(trained.increment.A, C=dict(list(trained.increment.C.items())[:-1]))
    with pytest.raises(ValueError, match=r"other modules than the base's.*'woodcut'"):
        mixed_bank.with_entries([replace(trained, increment=part)])


def test_a_policy_cannot_name_what_is_not_there_nor_be_cut_away(text_bank):
    with pytest.raises(ValueError, match="ghost"):
        replace(text_bank, always=("ghost",))
    with pytest.raises(ValueError, match=r"always erases \['neon'\]"):
        replace(text_bank, always=("neon",)).subset(["cat"])


def test_a_bank_loads_from_a_hub_and_then_without_it(mixed_bank, saved, tmp_path):
    """A repository id goes through huggingface_hub: one download, then the cache."""
    (saved / "notes.bin").write_bytes(b"not the bank's")
    cache = tmp_path / "cache"
    with serving(saved, "me/my-bank") as (endpoint, fetched):
        assert same(mixed_bank, ConceptBank.from_pretrained("me/my-bank", endpoint=endpoint, cache_dir=cache))
        assert MANIFEST in fetched
        assert "notes.bin" not in fetched
        fetched.clear()
        some = ConceptBank.from_pretrained(
            "me/my-bank", concepts=["neon", "woodcut"], endpoint=endpoint, cache_dir=tmp_path / "new"
        )
        assert same(some, mixed_bank.subset(["neon", "woodcut"]))
        assert sorted(fetched) == [
            "neon/text_increment.safetensors", MANIFEST, "woodcut/adapter_model.safetensors",
        ]  # fmt: skip
        with pytest.raises(RepositoryNotFoundError):
            ConceptBank.from_pretrained("me/other", endpoint=endpoint, cache_dir=cache)
    assert same(mixed_bank, ConceptBank.from_pretrained("me/my-bank", cache_dir=cache, local_files_only=True))


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file: data for file, data in tree(folder).items() if file.endswith(".safetensors")}


def test_a_compact_bank_is_small_and_survives_the_disk(mixed_bank, tmp_path):
    """What comes back is written again as it is, whatever dtype is asked for, and nothing moves a guard."""
    compact = mixed_bank.compact()
    for bank, folder in ((mixed_bank, "wide"), (compact, "compact")):
        bank.save_pretrained(tmp_path / folder, torch.float16)
    back = ConceptBank.from_pretrained(tmp_path / "compact")
    assert same(back, compact)
    back.save_pretrained(tmp_path / "again")
    wide, small = weights_of(tmp_path / "wide"), weights_of(tmp_path / "compact")
    assert weights_of(tmp_path / "again") == small
    assert len(small["neon/text_increment.safetensors"]) < 0.7 * len(wide["neon/text_increment.safetensors"])
    assert len(small["woodcut/module_increment.safetensors"]) < 0.5 * len(wide["woodcut/adapter_model.safetensors"])
    assert verify(tmp_path / "compact", random_pipeline()).ok


def test_a_compact_increment_reads_and_gives_what_it_did(mixed_bank):
    """Its gate too, which stands in the units of A."""
    tokens = torch.randn(3, 5, 384)
    for name in ("neon", "woodcut"):
        wide = mixed_bank[name].increment.gated(tokens, 0.5)
        small = wide.compact()
        ratio = small.gate / wide.gate
        torch.testing.assert_close(small.reading(tokens), ratio * wide.reading(tokens), rtol=5e-3, atol=0)
        for (key, one), other in zip(wide.tensors().items(), small.tensors().values(), strict=True):
            scale = ratio if key == "A" else 1 / ratio
            assert (other.double() - scale * one.double()).norm() < 1e-3 * other.double().norm()


def test_numbers_that_are_too_large_for_a_compact_bank_are_refused(mixed_bank):
    increment = mixed_bank["neon"].increment
    with pytest.raises(ValueError, match=r"NaN or Inf in \['B'\]"):
        replace(increment, B=1e9 * increment.B).compact()


def test_a_host_can_tell_a_breach_of_policy_from_other_errors(text_bank, tmp_path):
    bank = replace(text_bank, always=("cat",))
    bank.save_pretrained(tmp_path / "bank")
    breaches = [
        lambda: bank.subset(["neon"]),
        lambda: bank.obey_policy({"neon": 1.0}),
        lambda: bank.obey_policy({"cat": 0.5}),
        lambda: ConceptBank.from_pretrained(tmp_path / "bank", concepts=["neon"]),
    ]
    for breach in breaches:
        with pytest.raises(PolicyError, match=r"always erases \['cat'\]"):
            breach()
    assert issubclass(PolicyError, ValueError)


def changed(bank, **changes):
    return bank.with_entries([replace(bank["neon"], **changes)])


def test_the_digest_changes_with_all_that_a_bank_does_and_with_nothing_else(text_bank, tmp_path):
    increment, guards = text_bank["neon"].increment, text_bank["neon"].guards
    b = increment.B.clone()
    b[-1, -1] += 1e-6
    others = [
        text_bank,
        changed(text_bank, increment=replace(increment, B=b)),
        changed(text_bank, increment=replace(increment, B=increment.B.double())),
        changed(text_bank, increment=replace(increment, gate=0.5)),
        changed(text_bank, guards=(*guards, "a fox")),
        replace(text_bank, always=("neon",)),
        replace(text_bank, entries=dict(reversed(text_bank.entries.items()))),
        text_bank.subset(["neon", "cat"]),
        text_bank.compact(),
    ]
    assert len({bank.digest for bank in others}) == len(others)
    text_bank.save_pretrained(tmp_path)
    assert ConceptBank.from_pretrained(tmp_path).digest == text_bank.digest
    assert changed(text_bank, metrics={}).digest == text_bank.digest


def test_the_digest_does_not_depend_on_the_order_of_modules_and_doors(tmp_path):
    """Files of tensors have none: two loads of one file may give them in two orders."""
    torch.manual_seed(0)
    modules = {f"mid.attn2.to_{kind}": torch.randn(4, 2) for kind in "kv"}
    doors = {name: Increment(torch.randn(2, 6), B=torch.randn(6, 2), gate=0.5) for name in ("pooled", "second")}
    base = BaseModel("tiny", 8, 4, dict.fromkeys(modules, (4, 1.0)), dict.fromkeys(doors, 6))
    a, digests = torch.randn(2, 8), set()
    for turn in (list, reversed):
        c, beside = (dict(turn(factors.items())) for factors in (modules, doors))
        entry = Entry(Concept("neon"), Increment(a, C=c, doors=beside), SepMEConfig(), ("",), {"leakage": 0.0})
        bank = ConceptBank(base, {"neon": entry})
        bank.save_pretrained(tmp_path)
        digests |= {bank.digest, *(ConceptBank.from_pretrained(tmp_path).digest for _ in range(10))}
    assert len(digests) == 1


def test_a_bank_prints_on_one_line(text_bank):
    shown = repr(text_bank)
    assert len(shown) < 200
    assert "\n" not in shown
    assert all(part in shown for part in ("3 concepts", "'neon'", text_bank.base.name, text_bank.digest[:12]))
    many = [replace(text_bank["neon"], concept=Concept(f"neon {i}")) for i in range(30)]
    assert len(repr(text_bank.with_entries(many))) < 250


def test_a_notebook_shows_a_short_table_that_names_cannot_break_out_of(text_bank):
    many = [replace(text_bank["neon"], concept=Concept(f"<script>{i}")) for i in range(30)]
    page = text_bank.with_entries(many)._repr_html_()
    assert page.count("<tr>") == 1 + 20
    assert "and 13 more" in page
    assert "<script>" not in page
    assert "&lt;script&gt;0" in page


def test_pictures_are_written_under_the_lock_and_before_the_card_that_shows_them(text_bank, tmp_path):
    """A save that another one keeps out leaves no picture, nor does one that fails leave a card without its own."""
    picture = Picture("cat-before", "a cat", Image.new("RGB", (8, 8), "red"))
    text_bank.save_pretrained(tmp_path)
    before = tree(tmp_path)
    with FileLock(tmp_path / LOCK), pytest.raises(BankError, match="another process is saving"):
        text_bank.subset(["neon"]).save_pretrained(tmp_path, pictures=[picture])
    assert {file: data for file, data in tree(tmp_path).items() if file != LOCK} == before
    (tmp_path / "assets").write_bytes(b"in the way")
    with pytest.raises((BankError, OSError)):
        text_bank.subset(["neon"]).save_pretrained(tmp_path, pictures=[picture])
    (tmp_path / "assets").unlink()
    assert {file: data for file, data in tree(tmp_path).items() if file != LOCK} == before
