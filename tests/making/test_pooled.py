"""SDXL's pooled embedding is a second door: edited by the same algebra, with the same guards."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import SepMETrainer
from sepme_diffusers.algebra.closed_form import covariance
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.leakage import leakage
from sepme_diffusers.making.decouple import decouple
from sepme_diffusers.making.learner import Learner
from sepme_diffusers.making.loop import attached
from sepme_diffusers.making.noise import NoisyPictures
from sepme_diffusers.making.soft_guards import SoftGuards
from sepme_diffusers.text.encoding import Encoded, encode, encode_doors, rows
from small import CLOSED, CONCEPTS, TRAIN, latents, random_xl_pipeline

GUARDS = ["", "watermark"]
CONFIG = replace(CLOSED, gain=0.9, reserve=0.1)


@pytest.fixture(scope="module")
def xl():
    return random_xl_pipeline()


@pytest.fixture(scope="module")
def bank(xl):
    return SepMETrainer(xl, CONFIG, GUARDS).erase(CONCEPTS)


def pooled_of(pipe, prompts):
    return encode_doors(pipe, prompts)["pooled"]


def edited(increment, embeddings):
    return embeddings + embeddings @ increment.A.T @ increment.B.T


def test_pooled_embeddings_are_those_that_the_denoiser_gets(xl, pipe):
    prompts = ["a cat", "neon dog", "a pencil picture of a fox"]
    expected = xl.encode_prompt(prompts, do_classifier_free_guidance=False)[2]
    pooled = encode_doors(xl, prompts, batch_size=2)["pooled"]
    assert pooled.shape == (3, 1, 64)
    torch.testing.assert_close(pooled[:, 0], expected)
    assert torch.equal(Encoded(xl).at("pooled")(prompts), pooled_of(xl, prompts))
    assert torch.equal(Encoded(xl)(prompts), encode(xl, prompts))
    assert list(encode_doors(pipe, prompts)) == ["tokens"]
    with pytest.raises(ValueError, match=r"no embedding at the door 'pooled'; it has \['tokens'\]"):
        Encoded(pipe).at("pooled")


def test_guards_read_zero_at_the_pooled_door(xl, bank):
    """Hard guards and the names of all other concepts, to rounding; the concept's own prompts are read."""
    for name, entry in bank.items():
        pooled = entry.increment.doors["pooled"]
        scale = float(pooled.reading(pooled_of(xl, entry.concept.prompts)).max())
        assert scale > 0
        assert set(entry.guards) == {*GUARDS, *(other for other in bank if other != name)}
        assert float(pooled.reading(pooled_of(xl, list(entry.guards))).max()) < 1e-5 * scale, name
        assert entry.metrics["leakage"] < 1e-5


def test_the_concepts_pooled_rows_move_to_their_anchors_by_the_stated_share(xl, bank):
    for entry in bank.values():
        own = rows(pooled_of(xl, entry.concept.prompts))
        wanted = torch.cat([pooled_of(xl, anchors).mean(dim=0) for anchors in entry.concept.anchors]) - own
        moved = edited(entry.increment.doors["pooled"], own) - own
        assert float((moved * wanted).sum() / wanted.square().sum()) == pytest.approx(0.9, abs=1e-3)


def test_guarded_pictures_are_equal_to_the_bit_and_the_concepts_feel_both_doors(xl, bank):
    prompts = ["watermark", CONCEPTS[0].prompts[0]]
    before = latents(xl, prompts)
    alone = replace(bank["neon"], increment=replace(bank["neon"].increment, doors={}))
    after = {}
    for doors, loaded in (("both", bank), ("tokens", bank.with_entries([alone]))):
        xl.load_sepme(loaded)
        after[doors] = latents(xl, prompts, erased=["neon"])
        xl.unload_sepme()
        assert torch.equal(after[doors][0], before[0])
        assert not torch.equal(after[doors][1], before[1])
    assert not torch.equal(after["both"][1], after["tokens"][1])


def test_other_pipelines_have_no_further_door(text_bank):
    assert all(not entry.increment.doors for entry in text_bank.values())


@pytest.mark.parametrize("solver", ["train", "closed_form+train"])
def test_a_trained_increment_has_the_closed_forms_pooled_part(xl, bank, solver):
    config = replace(TRAIN, solver=solver, rank=CONFIG.rank, gain=CONFIG.gain, soft_guard_weight=0.0, reserve=0.1)
    trained = SepMETrainer(xl, config, GUARDS, others=list(bank)).erase(CONCEPTS[:1])["neon"].increment
    assert trained.form == "module"
    expected = bank["neon"].increment.doors["pooled"]
    assert torch.equal(trained.doors["pooled"].A, expected.A)
    assert torch.equal(trained.doors["pooled"].B, expected.B)


@pytest.mark.parametrize("form", ["module", "text"])
def test_training_sees_the_pooled_edit_that_the_pipeline_will_make(xl, bank, form):
    """The denoiser with a learner attached predicts what it predicts with the increment loaded."""
    entry, config = bank["neon"], replace(TRAIN, parametrisation=form)
    pictures = NoisyPictures(xl, entry.concept, config, Encoded(xl))
    weights = projection_weights(xl.unet)
    learner = Learner("neon", entry.increment.A, weights, pictures, config, entry.increment, entry.increment.doors)
    batch = pictures.next()
    with torch.no_grad():
        original = batch.predict_noise(xl.unet, batch.with_concept)
        with attached(xl.unet, [learner]):
            trained = batch.predict_noise(xl.unet, batch.with_concept)
        xl.load_sepme(bank, plain_pipelines="standing")
        xl.set_erased(["neon"])
        loaded = batch.predict_noise(xl.unet, batch.with_concept)
        xl.unload_sepme()
    torch.testing.assert_close(trained, loaded, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(trained, original, atol=1e-3)


def test_a_door_that_reads_nothing_of_the_concept_is_left_out(xl):
    """A second encoder that says the same of every prompt: the blank prompt is guarded, and nothing else is left."""
    weight = xl.text_encoder_2.text_projection.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.zero_()
        entry = SepMETrainer(xl, CONFIG).erase(CONCEPTS[:1])["neon"]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert entry.increment.doors == {}
    assert entry.increment.rank > 0


def test_soft_guards_hold_regular_prompts_at_the_pooled_door(xl, tmp_path):
    prompts = ["a dog", "a fox", "a bus", "neon"]
    regular = pooled_of(xl, prompts[:3])
    soft = SoftGuards.from_prompts(xl, prompts)
    torch.testing.assert_close(soft.pooled, covariance(rows(pooled_of(xl, prompts))))
    left = soft.without(xl, CONCEPTS[0], "pooled")
    torch.testing.assert_close(left, covariance(rows(regular)), rtol=1e-4, atol=1e-6)
    soft.save(tmp_path / "soft.safetensors")
    torch.testing.assert_close(SoftGuards.load(tmp_path / "soft.safetensors").pooled.double(), soft.pooled)
    config, moved = replace(CLOSED, soft_guard_weight=1000.0), []
    for guards in ((), prompts):
        increment = SepMETrainer(xl, config, regular=guards).erase(CONCEPTS[:1])["neon"].increment
        moved.append((edited(increment.doors["pooled"], regular) - regular).norm())
    assert moved[1] < 0.5 * moved[0]


def test_soft_guards_of_a_pipeline_without_the_door_are_refused(xl, pipe):
    """They would leave regular prompts unguarded there, in silence."""
    soft = replace(SoftGuards.from_prompts(xl, ["a dog", "a fox"]), pooled=None)
    assert SoftGuards.from_prompts(pipe, ["a dog"]).pooled is None
    with pytest.raises(ValueError, match="made with a pipeline without the door 'pooled'"):
        SepMETrainer(xl, CLOSED, regular=soft).erase(CONCEPTS[:1])


def test_a_gate_stands_at_the_pooled_door_too(xl):
    entry = SepMETrainer(xl, replace(CONFIG, gate=0.8)).erase(CONCEPTS[:1])["neon"]
    pooled = entry.increment.doors["pooled"]
    assert pooled.gate == pytest.approx(0.8 * float(pooled.reading(pooled_of(xl, entry.concept.prompts)).min()))


def test_names_that_do_not_fit_are_listed_with_the_largest_leak_of_both_doors(xl):
    names = [f"{first} {second}" for first in ("red", "old", "big") for second in ("cat", "dog", "fox", "bus", "pig")]
    trainer = SepMETrainer(xl, replace(CONFIG, reserve=0.9, name_weight=1e-3), others=names)
    entry = trainer.erase(CONCEPTS[:1])["neon"]
    increment, metrics = entry.increment, entry.metrics
    embeddings = encode_doors(xl, names)
    pooled, tokens = embeddings["pooled"], leakage(replace(increment, doors={}), embeddings["tokens"])
    moved = edited(increment.doors["pooled"], pooled) - pooled
    there = (moved.norm(dim=-1) / pooled.norm(dim=-1)).flatten().double()
    largest = torch.maximum(tokens, there).tolist()
    assert float(there.max()) > 1e-3
    ordered = sorted(zip(largest, names, strict=True), reverse=True)
    assert metrics["leakage_of"] == pytest.approx({name: leak for leak, name in ordered[:10]}, rel=1e-2)
    assert metrics["leakage_rest"] == pytest.approx(ordered[10][0], rel=1e-2)
    assert metrics["leakage"] == max(metrics["leakage_of"].values())
    capacity = trainer.capacity(CONCEPTS[:1])["neon"]
    assert capacity.names_exact < capacity.names == 16
    assert capacity.leakage == pytest.approx(max(largest), rel=1e-2)


def test_decoupling_guards_the_newcomer_at_the_pooled_door(xl, bank):
    trainer = SepMETrainer(xl, replace(CONFIG, gate=0.5), GUARDS)
    old = trainer.erase(CONCEPTS[:1])
    grown = decouple(trainer.erase(CONCEPTS[1:], old), xl)
    before, after = old["neon"].increment.doors["pooled"], grown["neon"].increment.doors["pooled"]
    newcomers, own = pooled_of(xl, ["cat", "pencil"]), pooled_of(xl, CONCEPTS[0].prompts)
    assert float(before.reading(newcomers).max()) > 1e-3 * float(before.reading(own).max())
    assert float(after.reading(newcomers).max()) < 1e-5 * float(after.reading(own).max())
    assert after.gate == pytest.approx(0.5 * float(after.reading(own).min()))
