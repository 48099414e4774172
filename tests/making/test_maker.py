"""Banks made from embeddings alone, and by a pipeline without a denoiser."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import SepMEConfig, SepMEPipeline, SepMETrainer, pocket
from sepme_diffusers.bank.checks.verify import verify
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.making.guards import Guards
from sepme_diffusers.making.maker import bank_from_embeddings
from sepme_diffusers.making.plan import Problem
from sepme_diffusers.text.encoding import Encoded
from small import CLOSED, CONCEPTS, TRAIN, latents, random_pipeline

GUARDS = ["", "watermark"]


@pytest.fixture
def blind():
    """A pipeline without a denoiser."""
    pipe = random_pipeline()
    pipe.unet = None
    return pipe


def same(first, second):
    assert list(first) == list(second)
    for name, entry in first.items():
        tensors = second[name].increment.tensors()
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in entry.increment.tensors().items())
        assert entry.metrics == second[name].metrics
        assert list(entry.guards) == list(second[name].guards)


@pytest.mark.parametrize("reserve", [0.25, 0.99], ids=["exact", "damped"])
def test_embeddings_alone_make_what_the_trainer_makes(blind, reserve):
    config = replace(CLOSED, reserve=reserve)
    encoded, names = Encoded(blind), [concept.name for concept in CONCEPTS]
    problem = Problem(Guards(GUARDS, encoded(GUARDS), config))

    def batches():
        yield names[:2], {"tokens": encoded(names[:2])}
        yield names[2:], {"tokens": encoded(names[2:])}

    trainer = SepMETrainer(blind, config, GUARDS)
    concepts = (EmbeddedConcept.of(concept, encoded) for concept in CONCEPTS)
    made = bank_from_embeddings(trainer.base(), problem, {"tokens": encoded(GUARDS)}, batches, concepts)
    assert problem.n_exact == (len(names) if reserve == 0.25 else 0)
    same(made, trainer.erase(CONCEPTS))


def test_a_bank_that_is_made_without_a_denoiser_erases_on_the_whole_pipeline(blind, pipe, tmp_path):
    bank = SepMETrainer(blind, CLOSED, GUARDS).erase(CONCEPTS)
    assert bank.base.projections is None
    assert verify(bank, blind).ok
    assert verify(bank, pipe).ok
    bank.save_pretrained(tmp_path / "bank")
    prompt, guarded = CONCEPTS[1].prompts[0], ["watermark", "neon", ""]
    before = latents(pipe, prompt), latents(pipe, guarded)
    pipe.load_sepme(tmp_path / "bank")
    assert torch.equal(latents(pipe, guarded, erased=["cat", "pencil"]), before[1])
    assert not torch.equal(latents(pipe, prompt, erased=["cat"]), before[0])


def test_the_built_in_model_makes_a_bank_without_its_denoiser(pocket_pipe):
    blind = SepMEPipeline.from_pretrained(pocket.path(), unet=None)
    bank = SepMETrainer(blind, CLOSED, GUARDS).erase(CONCEPTS)
    with_denoiser = SepMETrainer(pocket_pipe, CLOSED, GUARDS).erase(CONCEPTS)
    assert bank["cat"].increment.form == with_denoiser["cat"].increment.form == "text"
    assert with_denoiser.base.projections
    assert not bank.base.fingerprint.differs(with_denoiser.base.fingerprint)


@pytest.mark.parametrize("solver", ["train", "closed_form+train"])
def test_training_needs_the_denoiser(blind, solver):
    with pytest.raises(ValueError, match=r"trains on pictures .* \(unet=None\).*solver='closed_form'"):
        SepMETrainer(blind, replace(TRAIN, solver=solver))


def test_a_gated_concept_is_solved_once_more_for_its_adapter(pipe):
    config = replace(CLOSED, gate=0.8, gain=1.0, soft_guard_weight=3.0, adapter_soft_guard_weight=100.0)
    soft = ["a dog", "a house"]
    entry = SepMETrainer(pipe, config, GUARDS, soft).erase(CONCEPTS)["cat"]
    alone = replace(config, rank=SepMEConfig.linear().rank, gate=None, gain=None, soft_guard_weight=100.0)
    expected = SepMETrainer(pipe, alone, GUARDS, soft).erase(CONCEPTS)["cat"]
    assert entry.adapter.gate is None
    assert torch.equal(entry.adapter.A, expected.increment.A)
    assert torch.equal(entry.adapter.B, expected.increment.B)
    assert entry.metrics["adapter_leakage"] == expected.metrics["leakage"]
    assert not torch.equal(entry.adapter.B, entry.increment.B)
    assert expected.adapter is None


def test_no_more_embeddings_are_remembered_than_there_is_room_for(pipe):
    """What was not asked for the longest goes first, and is encoded again when it is asked for."""
    size = Encoded(pipe)(["a cat"]).nbytes
    encoded, whole = Encoded(pipe, 3 * size), Encoded(pipe)
    words = ["a cat", "a dog", "a fox", "a bus", "a cat", "neon"]
    for word in words:
        assert torch.equal(encoded([word]), whole([word]))
        assert len(encoded._known._known) <= 3
    torch.testing.assert_close(encoded(words), whole(words))
    encoded(["a bus"])
    encoded.prefetch(["a", "b", "c", "d"])
    assert "a bus" in encoded._known._known
    storages = {e.untyped_storage().nbytes() for doors in encoded._known._known.values() for e in doors.values()}
    assert storages == {size}
