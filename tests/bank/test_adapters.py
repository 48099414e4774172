"""Adapters beside a bank's increments: other tools load them, and draw what `set_erased` draws."""

import gc
import json
import logging
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file, save_file

from folders import reseal, tree
from hub import REPOSITORY
from sepme_diffusers import Concept, ConceptBank, Increment, SepMETrainer, pocket
from sepme_diffusers.bank.adapters import MOST, Adapters, KnownDenoiser
from sepme_diffusers.bank.checks.verify import verify
from sepme_diffusers.bank.disk.folder import sha256
from sepme_diffusers.bank.disk.layout import LORA_CONFIG, LORA_FILE, MANIFEST
from sepme_diffusers.increment.merging import in_half, merged
from small import CLOSED, CONCEPTS, draw, random_pipeline, random_xl_pipeline

# Factors in float16 change what is drawn by less than this share of what the erasure changes.
ROUNDED = 2e-3


@pytest.fixture(scope="module")
def sd() -> StableDiffusionPipeline:
    return random_pipeline()


@pytest.fixture
def bank(text_bank, sd) -> ConceptBank:
    return text_bank.remembering(sd)


@pytest.fixture(scope="module")
def xl() -> DiffusionPipeline:
    return random_xl_pipeline()


@pytest.fixture(scope="module")
def xl_bank(xl) -> ConceptBank:
    return SepMETrainer(xl, CLOSED).erase(CONCEPTS)


def records(folder: Path) -> dict:
    return json.loads((folder / MANIFEST).read_text("utf-8"))["concepts"]


def adapters(folder: Path) -> dict[str, dict]:
    return {name: record["adapter"] for name, record in records(folder).items() if "adapter" in record}


def loras(folder: Path) -> set[str]:
    return {str(file.parent.relative_to(folder)) for file in folder.rglob(LORA_CONFIG)}


def stronger(bank: ConceptBank, name: str, factor: float = 2.0) -> ConceptBank:
    increment = bank[name].increment
    return bank.with_entries([replace(bank[name], increment=replace(increment, B=factor * increment.B))])


def with_gates(bank: ConceptBank, gate: float = 1e-3) -> ConceptBank:
    return bank.with_entries(replace(e, increment=replace(e.increment, gate=gate)) for e in bank.values())


def copy_of(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    twin = UNet2DConditionModel.from_config(unet.config)
    twin.load_state_dict(unet.state_dict())
    return twin.eval()


def ours(pipe, bank: ConceptBank, name: str) -> torch.Tensor:
    pipe.load_sepme(bank)
    pipe.set_erased([name])
    try:
        return draw(pipe)
    finally:
        pipe.unload_sepme()


def by_peft(pipe, where: str | Path, folder: str) -> torch.Tensor:
    own = pipe.unet
    pipe.unet = PeftModel.from_pretrained(copy_of(own), where, subfolder=folder).get_base_model()
    try:
        return draw(pipe)
    finally:
        pipe.unet = own


def by_diffusers(pipe, where: str | Path, folder: str) -> torch.Tensor:
    pipe.unet.load_lora_adapter(where, subfolder=folder, prefix="base_model.model", weight_name=LORA_FILE)
    try:
        return draw(pipe)
    finally:
        pipe.unet.unload_lora()


def share(theirs: torch.Tensor, wanted: torch.Tensor, original: torch.Tensor) -> float:
    """How far two pictures are apart, as a share of what the erasure changes."""
    return float((theirs - wanted).abs().max() / (wanted - original).abs().max())


# --- what other tools read


@pytest.mark.parametrize("load", [by_peft, by_diffusers])
def test_other_tools_draw_what_is_drawn_here(load, bank, sd, tmp_path):
    bank.save_pretrained(tmp_path / "bank")
    original = draw(sd)
    for name in bank:
        wanted = ours(sd, bank, name)
        assert (wanted - original).abs().max() > 1e-2 * original.abs().max()
        assert (
            share(load(sd, tmp_path / "bank", adapters(tmp_path / "bank")[name]["folder"]), wanted, original) < ROUNDED
        )


@pytest.mark.parametrize("load", [by_peft, by_diffusers])
def test_the_pooled_embedding_of_sdxl_is_edited_as_well(load, xl_bank, xl, tmp_path):
    xl_bank.save_pretrained(tmp_path / "bank")
    tensors = load_file(tmp_path / "bank" / "neon" / LORA_FILE)
    assert sum("add_embedding.linear_1" in key for key in tensors) == 2
    original, wanted = draw(xl), ours(xl, xl_bank, "neon")
    tokens_alone = xl_bank.with_entries([replace(xl_bank["neon"], increment=_without_doors(xl_bank))])
    assert share(ours(xl, tokens_alone, "neon"), wanted, original) > 10 * ROUNDED
    assert share(load(xl, tmp_path / "bank", "neon"), wanted, original) < ROUNDED
    assert verify(tmp_path / "bank", xl).ok


def _without_doors(bank: ConceptBank) -> Increment:
    return replace(bank["neon"].increment, doors={})


@pytest.mark.parametrize("load", [by_peft, by_diffusers])
def test_what_lies_on_the_hub_is_read_with_no_code_of_ours(load, bank, sd, push, server, monkeypatch, tmp_path):
    push(bank)
    server.use(monkeypatch, tmp_path / "cache")
    original, wanted = draw(sd), ours(sd, bank, "neon")
    server.forget()
    assert share(load(sd, REPOSITORY, "neon"), wanted, original) < ROUNDED
    assert "neon/adapter_model.safetensors" in server.fetched
    assert all(file.startswith("neon/") for file in server.fetched)


def test_an_adapter_is_a_plain_lora_in_half_precision(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "neon" / LORA_CONFIG).read_text())
    assert config["lora_alpha"] == config["r"] == bank["neon"].increment.rank
    tensors = load_file(tmp_path / "neon" / LORA_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert {key.split(".lora_")[0].removeprefix("base_model.model.") for key in tensors} == set(bank.base.projections)


@pytest.mark.parametrize("how", ["float32", "float16", "compact"])
def test_it_is_the_expansion_of_what_is_stored(how, bank, sd, tmp_path):
    """In float32, whatever precision the increment is stored in; and verify finds it so."""
    bank = bank.compact() if how == "compact" else bank
    bank.save_pretrained(tmp_path, dtype=torch.float16 if how == "float16" else None)
    stored = ConceptBank.from_pretrained(tmp_path)["neon"].increment
    maker = Adapters(bank.base, sd.unet, "")
    expected = in_half(merged([(stored, 1.0)], maker.weights, {}))
    tensors = load_file(tmp_path / "neon" / LORA_FILE)
    for module, (a, c) in expected.items():
        assert torch.equal(tensors[f"base_model.model.{module}.lora_A.weight"], a)
        assert torch.equal(tensors[f"base_model.model.{module}.lora_B.weight"], c)
    assert verify(tmp_path, sd).ok


def test_numbers_beyond_the_range_of_half_precision_are_scaled_or_left_out(bank, sd, tmp_path, caplog):
    """A tiny A with a large B is one change; what is too large as a product has no adapter, and the log says so."""
    increment = bank["neon"].increment
    uneven = bank.with_entries([replace(bank["neon"], increment=Increment(increment.A * 1e-7, B=increment.B * 1e7))])
    uneven.save_pretrained(tmp_path / "uneven")
    assert verify(tmp_path / "uneven", sd).ok
    stronger(bank, "neon", 1e7).save_pretrained(tmp_path / "large")
    assert adapters(tmp_path / "large").keys() == {"cat", "pencil"}
    assert "'neon': \"the changes of" in caplog.text
    assert "too large for float16" in caplog.text


# --- a gate


def test_a_gated_increment_has_the_adapter_of_the_same_one_without_a_gate(bank, tmp_path):
    with_gates(bank).save_pretrained(tmp_path / "gated")
    bank.save_pretrained(tmp_path / "bank")
    one, other = (tree(tmp_path / which / "neon") for which in ("gated", "bank"))
    assert one == other
    assert adapters(tmp_path / "gated")["neon"]["of"] == records(tmp_path / "gated")["neon"]["digest"]


@pytest.fixture
def solved_again(bank) -> ConceptBank:
    """Gated increments, of which one was solved once more for its adapter."""
    gated = with_gates(bank)
    weaker = replace(bank["neon"].increment, B=0.5 * bank["neon"].increment.B)
    metrics = {**bank["neon"].metrics, "adapter_leakage": 0.0123}
    return gated.with_entries([replace(gated["neon"], adapter=weaker, metrics=metrics)])


def test_an_increment_that_was_solved_once_more_is_the_adapter(solved_again, bank, sd, tmp_path):
    solved_again.save_pretrained(tmp_path / "bank")
    said = adapters(tmp_path / "bank")["neon"]
    assert said["of"] != records(tmp_path / "bank")["neon"]["digest"]
    assert said["leakage"] == 0.0123
    half = stronger(bank, "neon", 0.5)
    assert share(by_peft(sd, tmp_path / "bank", "neon"), ours(sd, half, "neon"), draw(sd)) < ROUNDED
    line = next(row for row in (tmp_path / "bank" / "README.md").read_text().splitlines() if row.startswith("| neon"))
    assert f"leakage {bank['neon'].metrics['leakage']:.4g}" in line
    assert "adapter leakage 0.0123" in line
    report = verify(tmp_path / "bank", sd)
    assert report.ok
    assert any("neon were solved for without a gate" in note for note in report.notes)


def test_an_adapter_that_was_solved_once_more_is_kept_while_it_is_the_same(solved_again, bank, tmp_path):
    solved_again.save_pretrained(tmp_path)
    before = tree(tmp_path / "neon")
    ConceptBank.from_pretrained(tmp_path).save_pretrained(tmp_path)
    solved_again.save_pretrained(tmp_path)
    assert tree(tmp_path / "neon") == before
    other = replace(solved_again["neon"], adapter=bank["neon"].increment)
    solved_again.with_entries([other]).save_pretrained(tmp_path)
    assert tree(tmp_path / adapters(tmp_path)["neon"]["folder"]) != before


# --- when there are adapters


def test_a_bank_that_was_made_here_has_them(sd, tmp_path):
    SepMETrainer(sd, CLOSED).erase(CONCEPTS).save_pretrained(tmp_path)
    assert loras(tmp_path) == {"neon", "cat", "pencil"}


def test_a_bank_of_which_the_denoiser_is_not_known_has_none(text_bank, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        text_bank.save_pretrained(tmp_path)
    assert loras(tmp_path) == set()
    assert "no denoiser is known" in caplog.text


def test_a_denoiser_is_remembered_by_what_is_derived_and_never_stored(bank, sd, tmp_path):
    derived = [bank.subset(["neon"]), bank.compact(), stronger(bank, "cat"), replace(bank, always=("cat",))]
    assert all(each.denoiser.module is sd.unet for each in derived)
    assert pickle.loads(pickle.dumps(bank)).denoiser.module is None
    bank.save_pretrained(tmp_path)
    assert ConceptBank.from_pretrained(tmp_path).denoiser is None
    assert bank == replace(bank, denoiser=None)


def test_a_denoiser_is_not_kept_alive():
    pipe = random_pipeline()
    known = KnownDenoiser.of(pipe)
    assert known.module is pipe.unet
    del pipe
    gc.collect()
    assert known.module is None


def test_asking_for_them_without_a_denoiser_is_refused_before_anything_is_written(text_bank, tmp_path):
    with pytest.raises(ValueError, match="base="):
        text_bank.save_pretrained(tmp_path / "bank", adapters=True)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize("of", [lambda pipe: pipe, lambda pipe: pipe.unet, lambda pipe: torch.compile(pipe.unet)])
def test_a_base_is_a_pipeline_or_a_denoiser(of, text_bank, sd, tmp_path):
    text_bank.save_pretrained(tmp_path, base=of(sd))
    assert loras(tmp_path) == {"neon", "cat", "pencil"}
    assert {adapter["base"] for adapter in adapters(tmp_path).values()} == {text_bank.base.name}


@pytest.mark.parametrize("adapters", [None, True])
def test_a_denoiser_of_another_width_is_refused(adapters, text_bank, xl, tmp_path):
    with pytest.raises(ValueError, match="another base: embeddings are 384 wide in the bank, and \\[96\\] there"):
        text_bank.save_pretrained(tmp_path / "bank", adapters=adapters, base=xl)
    assert not (tmp_path / "bank").exists()


def test_a_denoiser_without_linears_that_read_the_text_alone_gets_none(text_bank, tmp_path, caplog):
    stranger = torch.nn.Linear(3, 3)
    stranger.config = {}
    text_bank.remembering(stranger).save_pretrained(tmp_path / "bank")
    assert loras(tmp_path / "bank") == set()
    assert "no Linears of Linear are known that read the text" in caplog.text
    with pytest.raises(ValueError, match="no Linears of Linear"):
        text_bank.save_pretrained(tmp_path / "other", base=stranger)


def test_a_door_that_no_linear_reads_leaves_no_half_of_an_erasure(bank, tmp_path, caplog):
    further = Increment(torch.ones(1, 8), B=torch.ones(8, 1))
    base = replace(bank.base, doors={**bank.base.doors, "pooled": replace(bank.base.doors["tokens"], width=8)})
    entry = replace(bank["neon"], increment=replace(bank["neon"].increment, doors={"pooled": further}))
    replace(bank, base=base).with_entries([entry]).save_pretrained(tmp_path)
    assert loras(tmp_path) == {"cat", "pencil"}
    assert "'neon': \"increments act at the door 'pooled'" in caplog.text


def test_false_removes_them(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    ConceptBank.from_pretrained(tmp_path).save_pretrained(tmp_path, adapters=False)
    assert loras(tmp_path) == set()
    assert not (tmp_path / "neon").exists()
    assert not adapters(tmp_path)


def many(bank: ConceptBank, n: int) -> ConceptBank:
    """A bank of n concepts of rank 1."""
    increment = bank["neon"].increment
    one = replace(bank["neon"], increment=Increment(increment.A[:1], B=increment.B[:, :1]))
    names = [f"neon {number}" for number in range(n)]
    entries = [replace(one, concept=Concept(name, one.concept.pairs)) for name in names]
    return replace(bank, entries={}).with_entries(entries)


def test_a_bank_of_200_has_adapters_and_one_more_loses_them(bank, tmp_path, caplog):
    large = many(bank, MOST)
    large.save_pretrained(tmp_path)
    assert len(loras(tmp_path)) == 200
    assert not caplog.text
    larger = ConceptBank.from_pretrained(tmp_path).with_entries([bank["cat"]])
    larger.save_pretrained(tmp_path)
    assert loras(tmp_path) == set()
    assert "the bank has 201 concepts" in caplog.text


def test_a_large_bank_has_them_if_they_are_asked_for(bank, tmp_path):
    many(bank, MOST + 1).save_pretrained(tmp_path, adapters=True)
    assert len(loras(tmp_path)) == 201


def test_a_trained_increment_is_its_own_adapter(mixed_bank, sd, tmp_path):
    mixed_bank.save_pretrained(tmp_path, base=sd)
    assert "adapter" not in records(tmp_path)["woodcut"]
    assert loras(tmp_path) == {"neon", "cat", "pencil", "woodcut"}
    compact = mixed_bank.compact()
    compact.save_pretrained(tmp_path / "compact", base=sd)
    assert share(by_peft(sd, tmp_path / "compact", "woodcut"), ours(sd, compact, "woodcut"), draw(sd)) < ROUNDED


# --- how long one is kept


def test_one_is_kept_while_its_increment_is_the_same(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    before = tree(tmp_path)
    loaded = ConceptBank.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert tree(tmp_path) == before
    described = replace(loaded["neon"], metrics={**loaded["neon"].metrics, "note": "x"})
    stronger(loaded, "cat").with_entries([described]).subset(["neon", "cat"]).save_pretrained(tmp_path)
    assert loras(tmp_path) == {"neon"}  # of "cat" it is not known what the new one is, and "pencil" is gone
    assert tree(tmp_path / "neon") == {name[5:]: data for name, data in before.items() if name.startswith("neon/")}


def test_one_is_replaced_with_its_increment(bank, sd, tmp_path):
    bank.save_pretrained(tmp_path)
    before = adapters(tmp_path)
    stronger(bank, "neon").save_pretrained(tmp_path)
    after = adapters(tmp_path)
    assert after["neon"]["of"] != before["neon"]["of"]
    assert {name: adapter for name, adapter in after.items() if name != "neon"} == {
        name: adapter for name, adapter in before.items() if name != "neon"
    }
    assert loras(tmp_path) == {after["neon"]["folder"], "cat", "pencil"}
    assert verify(tmp_path, sd).ok


def test_one_is_made_anew_for_the_base_that_is_given(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    before = tree(tmp_path)
    other = other_weights()
    other.register_to_config(_name_or_path="me/other")
    ConceptBank.from_pretrained(tmp_path).save_pretrained(tmp_path, base=other)
    assert {adapter["base"] for adapter in adapters(tmp_path).values()} == {"me/other"}
    assert verify(tmp_path, other).ok
    assert not {data for file, data in before.items() if LORA_FILE in file} & set(tree(tmp_path).values())


def other_weights() -> StableDiffusionPipeline:
    """Another checkpoint with the same text encoder."""
    pipe = random_pipeline()
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "attn2" in name:
                parameter.mul_(1.1)
    return pipe


def test_a_damaged_one_is_made_again_or_left_out(bank, sd, tmp_path):
    bank.save_pretrained(tmp_path)
    (tmp_path / "neon" / LORA_FILE).write_bytes(b"damaged")
    bank.save_pretrained(tmp_path)
    assert verify(tmp_path, sd).ok
    assert adapters(tmp_path).keys() == {"neon", "cat", "pencil"}
    (tmp_path / "cat" / LORA_FILE).unlink()
    ConceptBank.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert adapters(tmp_path).keys() == {"neon", "pencil"}


def test_they_go_along_to_another_folder_if_they_are_sound(bank, sd, tmp_path, caplog):
    bank.save_pretrained(tmp_path / "bank")
    (tmp_path / "bank" / "cat" / LORA_FILE).write_bytes(b"damaged")
    with caplog.at_level(logging.INFO):
        ConceptBank.from_pretrained(tmp_path / "bank").save_pretrained(tmp_path / "copy")
    assert loras(tmp_path / "copy") == {"neon", "pencil"}
    assert tree(tmp_path / "copy" / "neon") == tree(tmp_path / "bank" / "neon")
    assert "the adapter of 'cat' is not copied" in caplog.text
    assert verify(tmp_path / "copy", sd).ok


def test_a_bank_loads_without_its_adapters(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    for name in bank:
        (tmp_path / name / LORA_FILE).unlink()
        (tmp_path / name / LORA_CONFIG).unlink()
    assert ConceptBank.from_pretrained(tmp_path).digest == bank.digest


# --- on the Hub


def test_the_loader_downloads_no_adapter(bank, push, pull, server):
    push(bank)
    server.forget()
    assert len(dict(pull())) == 3
    assert sorted(server.fetched) == sorted([MANIFEST, *json.loads(server.files(REPOSITORY)[MANIFEST])["shards"]])


def test_a_changed_concept_is_pushed_with_its_adapter_alone(bank, push, pull, server, sd):
    push(bank)
    kept = {file: data for file, data in server.files(REPOSITORY).items() if file.startswith(("cat/", "pencil/"))}
    server.forget()
    push(stronger(pull().remembering(sd), "neon"))
    (commit,) = server.commits
    assert {file for file in commit if "/" in file} == {"neon/adapter_model.safetensors"}
    assert len(server.uploaded) == 2  # the adapter and a shard
    assert {file: server.files(REPOSITORY)[file] for file in kept} == kept


def test_a_changed_concept_loses_an_adapter_that_nobody_can_make(bank, push, pull, server):
    push(bank)
    push(stronger(pull(), "neon"))
    files = server.files(REPOSITORY)
    assert not any(file.startswith("neon/") for file in files)
    assert {"cat/adapter_model.safetensors", "pencil/adapter_model.safetensors"} <= files.keys()


def test_pushing_what_is_there_uploads_nothing(bank, push, pull, server, sd):
    push(bank)
    server.forget()
    push(pull())
    push(pull().remembering(sd))
    push(bank)
    assert (server.commits, server.uploaded) == ([], [])


def test_adapters_that_the_hub_lacks_are_pushed_if_they_are_asked_for(text_bank, push, pull, server, sd):
    push(text_bank)
    shards = json.loads(server.files(REPOSITORY)[MANIFEST])["shards"]
    pulled = pull()
    with pytest.raises(ValueError, match="base="):
        push(pulled, adapters=True)
    push(pulled, adapters=True, base=sd)
    files = server.files(REPOSITORY)
    assert {f"{name}/{LORA_FILE}" for name in text_bank} <= files.keys()
    assert json.loads(files[MANIFEST])["shards"] == shards
    assert pull().digest == text_bank.digest


def test_false_takes_them_off_the_hub(bank, push, pull, server):
    push(bank)
    push(pull(), adapters=False, concepts=["cat"])
    folders = {file.split("/")[0] for file in server.files(REPOSITORY) if "/" in file}
    assert folders == {"neon", "pencil"}
    push(pull(), adapters=False)
    assert not any("/" in file for file in server.files(REPOSITORY))
    assert pull().digest == bank.digest


def test_a_bank_on_the_hub_that_grows_large_loses_them(bank, push, pull, server, sd):
    push(many(bank, MOST))
    assert sum(LORA_FILE in file for file in server.files(REPOSITORY)) == 200
    push(pull().with_entries([bank["cat"]]).subset(["cat"]).remembering(sd))
    assert not any("/" in file for file in server.files(REPOSITORY))
    assert len(pull()) == 201


# --- what verify finds


@pytest.fixture
def tampered(bank, tmp_path) -> Callable[[Callable[[dict, dict], object]], Path]:
    """Edits the adapter of "neon" and gives the manifest hashes and a digest that are true of it."""

    def edited(edit: Callable[[dict, dict], object], said: dict | None = None) -> Path:
        bank.save_pretrained(tmp_path)
        place = tmp_path / "neon"
        tensors, config = load_file(place / LORA_FILE), json.loads((place / LORA_CONFIG).read_text())
        edit(tensors, config)
        save_file(tensors, place / LORA_FILE)
        (place / LORA_CONFIG).write_text(json.dumps(config))
        files = {file: sha256((place / file).read_bytes()) for file in (LORA_FILE, LORA_CONFIG)}
        reseal(tmp_path, lambda manifest: manifest["concepts"]["neon"]["adapter"].update(files=files, **(said or {})))
        return tmp_path

    return edited


def _first(tensors: dict, factor: str) -> str:
    return next(key for key in sorted(tensors) if f"lora_{factor}" in key)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_half_precision_finds_no_fault(dtype, bank, xl_bank, tmp_path):
    for made, pipe, name in ((bank, random_pipeline(), "sd"), (xl_bank, random_xl_pipeline(), "xl")):
        made.save_pretrained(tmp_path / name)
        pipe.unet.to(dtype)
        assert verify(tmp_path / name, pipe).faults == ()


def test_what_is_not_touched_is_no_fault(tampered, sd):
    folder = tampered(lambda tensors, config: None)
    assert verify(folder, sd).ok
    report = verify(folder)
    assert report.ok
    assert any("adapters of neon, cat, pencil were not compared" in note for note in report.notes)


def _turn(tensors: dict, config: dict) -> None:
    key = _first(tensors, "A")
    tensors[key] = tensors[key].flip(1).contiguous()


def _double(tensors: dict, config: dict) -> None:
    tensors[_first(tensors, "B")] *= 1.01


def _drop(tensors: dict, config: dict) -> None:
    key = _first(tensors, "A").removesuffix(".lora_A.weight")
    del tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    config["target_modules"].remove(key.removeprefix("base_model.model."))


def _add(tensors: dict, config: dict) -> None:
    a, b = tensors[_first(tensors, "A")], tensors[_first(tensors, "B")]
    tensors |= {"base_model.model.proj.lora_A.weight": a.clone(), "base_model.model.proj.lora_B.weight": b.clone()}
    config["target_modules"] = sorted([*config["target_modules"], "proj"])


@pytest.mark.parametrize(
    ("edit", "fault", "by_itself"),
    [
        (_turn, "reads what its increment does not", True),
        (_double, "does something else than its increment", False),
        (_drop, "changes other modules than its increment", False),
        (_add, "changes other modules than its increment", False),
        (lambda tensors, config: config.update(lora_alpha=1), "tells other tools something else.*lora_alpha", True),
        (lambda tensors, config: config.update(use_rslora=True), "tells other tools something else.*use_rslora", True),
        (lambda tensors, config: tensors.update(x=torch.ones(1)), "not a LoRA that tools read", True),
        (
            lambda tensors, config: tensors[_first(tensors, "B")].fill_(float("nan")),
            "numbers that are not finite",
            True,
        ),
        (lambda tensors, config: tensors.update({_first(tensors, "B"): torch.ones(2, 2)}), "factors of shape", True),
    ],
)
def test_an_adapter_that_does_something_else_is_a_fault(edit, fault, by_itself, tampered, sd):
    """Although its hashes are true: some of it by itself, the rest with the weights of its base."""
    folder = tampered(edit)
    assert [f for f in verify(folder, sd).faults if "concept 'neon'" in f and re.search(fault, f)]
    assert verify(folder).ok is not by_itself
    assert ConceptBank.from_pretrained(folder)["neon"]  # which never reads it


def test_an_adapter_of_another_increment_is_a_fault_where_there_is_no_gate(tampered, sd):
    folder = tampered(_double, {"of": "0" * 64})
    assert "said to be of another increment" in " ".join(verify(folder).faults)


def test_an_adapter_that_was_solved_once_more_and_moves_guards_is_a_fault(solved_again, bank, sd, tmp_path):
    noise = Increment(
        torch.randn(2, 384, generator=torch.Generator().manual_seed(0)), B=bank["neon"].increment.B[:, :2]
    )
    solved_again.with_entries([replace(solved_again["neon"], adapter=noise)]).save_pretrained(tmp_path)
    assert "its adapter moves the guarded prompt" in " ".join(verify(tmp_path, sd).faults)


def test_files_that_are_not_what_their_hashes_say_are_faults(bank, tmp_path):
    bank.save_pretrained(tmp_path)
    (tmp_path / "neon" / LORA_CONFIG).write_text("{}")
    (tmp_path / "cat" / LORA_FILE).unlink()
    faults = " ".join(verify(tmp_path).faults)
    assert "neon/adapter_config.json is damaged" in faults
    assert "cat/adapter_model.safetensors is missing" in faults


def test_an_adapter_is_not_compared_with_other_weights(bank, tmp_path):
    """Another checkpoint with the same text encoders: its weights make other adapters, which is no fault."""
    bank.save_pretrained(tmp_path)
    report = verify(tmp_path, other_weights())
    assert report.ok
    assert any("were not compared" in note for note in report.notes)


def test_the_shipped_banks_have_none():
    for name in ("styles", "objects"):
        assert not loras(pocket.path().parent / "banks" / name)
