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
from safetensors.torch import load_file

from folders import SHARD, reseal, same, shard_of, tree
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
from sepme_diffusers.bank.checks.verify import verify
from sepme_diffusers.bank.disk.layout import LOCK, MANIFEST
from sepme_diffusers.bank.entries import Entries
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.bank.guard_sets import GuardSet
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
    (shard,) = {shard_of(saved, name).name for name in ("neon", "cat", "pencil")}
    assert SHARD.fullmatch(shard)
    assert set(tree(saved)) == {
        "sepme_bank.json", "README.md", shard, "woodcut/adapter_model.safetensors", "woodcut/adapter_config.json",
    }  # fmt: skip
    assert set(load_file(saved / shard)) == {"tokens.A", "tokens.B"}


def test_half_precision_keeps_the_basis_exact(mixed_bank, tmp_path):
    mixed_bank.save_pretrained(tmp_path / "bank", dtype=torch.float16)
    back = ConceptBank.from_pretrained(tmp_path / "bank")
    for name, entry in mixed_bank.items():
        assert torch.equal(back[name].increment.A, entry.increment.A)
        factors = back[name].increment.tensors()
        assert all(tensor.dtype == torch.float16 for key, tensor in factors.items() if key != "A")


def test_saving_again_changes_no_byte(mixed_bank, saved):
    before = tree(saved)
    untouched = weights_untouched(saved)
    ConceptBank.from_pretrained(saved).save_pretrained(saved)
    assert tree(saved) == before
    assert weights_untouched(saved) == untouched


def weights_untouched(folder: Path) -> dict[str, tuple[int, int]]:
    """Whose inode and time of change stay is a file that nobody touched."""
    status = {str(file.relative_to(folder)): file.stat() for file in folder.rglob("*.safetensors")}
    return {file: (found.st_ino, found.st_mtime_ns) for file, found in status.items()}


def test_adding_a_concept_leaves_the_others_files_alone_and_writes_one(text_bank, mixed_bank, tmp_path):
    text_bank.save_pretrained(tmp_path)
    before = weights_untouched(tmp_path)
    mixed_bank.save_pretrained(tmp_path)
    after = weights_untouched(tmp_path)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"woodcut/adapter_model.safetensors"}
    more = replace(text_bank["neon"], concept=Concept("oil"))
    ConceptBank.from_pretrained(tmp_path).with_entries([more]).save_pretrained(tmp_path)
    assert after.items() <= weights_untouched(tmp_path).items()
    assert len(weights_untouched(tmp_path)) == len(after) + 1


def stronger(entry: Entry) -> Entry:
    return replace(entry, increment=replace(entry.increment, B=entry.increment.B * 2))


def test_replacing_a_concept_leaves_the_others_files_alone_and_writes_one(mixed_bank, saved):
    before = weights_untouched(saved)
    bank = mixed_bank.with_entries([stronger(mixed_bank["neon"])])
    bank.save_pretrained(saved)
    after = weights_untouched(saved)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {shard_of(saved, "neon").name}
    assert same(bank, ConceptBank.from_pretrained(saved))


def test_packing_drops_rows_that_nobody_refers_to(text_bank, tmp_path):
    """The bank that is loaded is the same to the bit; the files of three saves become one."""
    bank = text_bank
    for name in ("neon", "cat"):
        bank.save_pretrained(tmp_path)
        bank = bank.with_entries([stronger(bank[name])])
    bank.save_pretrained(tmp_path)
    assert len(weights_untouched(tmp_path)) == 3
    loose = ConceptBank.from_pretrained(tmp_path)
    loose.save_pretrained(tmp_path, pack=True)
    (shard,) = weights_untouched(tmp_path)
    assert len(load_file(tmp_path / shard)["tokens.A"]) == sum(entry.increment.rank for entry in bank.values())
    packed = ConceptBank.from_pretrained(tmp_path)
    assert same(packed, bank)
    assert packed.digest == loose.digest == bank.digest
    before = tree(tmp_path)
    packed.save_pretrained(tmp_path, pack=True)
    assert tree(tmp_path) == before


def test_removed_and_replaced_concepts_leave_nothing_behind(mixed_bank, saved):
    """Not even where a shard was shared: packed, it holds the rows of what is there."""
    bank = mixed_bank.subset(["neon", "pencil"]).with_entries([stronger(mixed_bank["neon"])])
    bank.save_pretrained(saved, pack=True)
    assert same(bank, ConceptBank.from_pretrained(saved))
    (shard,) = weights_untouched(saved)
    assert set(tree(saved)) == {"sepme_bank.json", "README.md", shard}
    bank.subset(["neon"]).save_pretrained(saved)
    bank.with_entries([bank["neon"]]).subset(["pencil"]).save_pretrained(saved, pack=True)
    assert len(weights_untouched(saved)) == 1


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
    more = [replace(mixed_bank["neon"], concept=Concept(name)) for name in ("oil", "ink")]
    mixed_bank.with_entries(more).save_pretrained(saved)
    assert shard_of(saved, "oil") != shard_of(saved, "neon")
    shard_of(saved, "oil").unlink()
    some = ConceptBank.from_pretrained(saved, concepts=["woodcut", "neon"])
    assert same(some, mixed_bank.subset(["neon", "woodcut"]))
    with pytest.raises(BankError, match="is missing"):
        ConceptBank.from_pretrained(saved)
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
    increment, tokens = bank["neon"].increment, rows(encode(pipe, ["watermark"]))
    measured = float(((tokens @ increment.A.T @ increment.B.T).norm(dim=1) / tokens.norm(dim=1)).max())
    assert promise.leakage == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("concept", ["neon", "woodcut"])
def test_damage_is_found_and_named(saved, concept):
    file = shard_of(saved, "neon") if concept == "neon" else saved / "woodcut" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BankError, match=f"{file.name} is damaged or was changed"):
        ConceptBank.from_pretrained(saved)


def test_missing_file_is_named(saved):
    shard = shard_of(saved, "neon")
    shard.unlink()
    with pytest.raises(BankError, match=f"{shard.name} is missing"):
        ConceptBank.from_pretrained(saved)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x.safetensors", "neon/../../y", "a/b", "neon\\x", "neon", "."])
def test_a_manifest_cannot_lead_out_of_the_folder(saved, path):
    def edit(manifest):
        (shard,) = manifest["shards"]
        manifest["shards"][path] = manifest["shards"].pop(shard)
        for record in manifest["concepts"].values():
            record.update({"shard": path} if "shard" in record else {})

    sound = (saved / MANIFEST).read_bytes()
    reseal(saved, edit)
    with pytest.raises(BankError, match=r"\$\.shards"):
        ConceptBank.from_pretrained(saved)
    (saved / MANIFEST).write_bytes(sound)
    reseal(saved, lambda m: m["concepts"]["woodcut"].update(folder=path))
    with pytest.raises(BankError, match=r"not valid under any|does not match|is not named after it|woodcut\.folder"):
        ConceptBank.from_pretrained(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(version=99), "version 99.*Upgrade"),
        (lambda m: m.update(format="zip"), "not the manifest of a concept bank"),
        (lambda m: m.pop("base"), "not a valid bank manifest.*base"),
        (lambda m: next(iter(m["configs"].values())).update(speed=1), "speed"),
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
        assert set(fetched) == {shard_of(saved, "neon").name, MANIFEST, "woodcut/adapter_model.safetensors"}
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
    assert len(small) == 2  # one shard for each form
    assert sum(map(len, small.values())) < 0.6 * sum(map(len, wide.values()))
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
    increment, guards = text_bank["neon"].increment, text_bank["neon"].guard_set
    b = increment.B.clone()
    b[-1, -1] += 1e-6
    others = [
        text_bank,
        changed(text_bank, increment=replace(increment, B=b)),
        changed(text_bank, increment=replace(increment, B=increment.B.double())),
        changed(text_bank, increment=replace(increment, gate=0.5)),
        changed(text_bank, guard_set=GuardSet(("a fox",), extends=guards)),
        replace(text_bank, always=("neon",)),
        replace(text_bank, entries=Entries(dict(reversed(list(text_bank.entries.items()))))),
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
    a, digests = torch.randn(2, 8), set()
    for turn in (list, reversed):
        c, further = (dict(turn(factors.items())) for factors in (modules, doors))
        known = {"tokens": Encoding(8, 4), **dict.fromkeys(turn(doors), Encoding(6))}
        base = BaseModel("tiny", known, projections=dict.fromkeys(turn(modules), (4, 1.0)))
        increment = Increment(a, C=c, doors=further)
        entry = Entry(Concept("neon"), increment, SepMEConfig(), GuardSet(("",)), {"leakage": 0.0})
        bank = ConceptBank(base, Entries({"neon": entry}))
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
