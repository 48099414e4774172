"""A bank that grew is made symmetric again: no increment moves a concept that joined after it."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept, ConceptBank, SepMETrainer
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.leakage import leakage
from sepme_diffusers.making.decouple import decouple
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.text.encoding import Encoded, encode
from small import CLOSED, CONCEPTS, latents, random_pipeline


@pytest.fixture
def decoupled(pipe, mixed_bank):
    return decouple(mixed_bank, pipe)


def test_the_newcomer_is_guarded_to_the_bit_whatever_is_erased(pipe, mixed_bank, decoupled):
    before = latents(pipe, "woodcut")
    pipe.load_sepme(mixed_bank, name="as it grew")
    assert not torch.equal(latents(pipe, "woodcut", erased=["neon", "cat", "pencil"]), before)
    pipe.unload_sepme()
    pipe.load_sepme(decoupled)
    assert torch.equal(latents(pipe, "woodcut", erased=["neon", "cat", "pencil"]), before)
    assert decoupled.guarantees["woodcut"].exact
    assert all(promise.exact for promise in decoupled.guarantees.values())


def test_what_knew_everyone_is_left_as_it_is(mixed_bank, decoupled):
    assert decoupled["woodcut"] is mixed_bank["woodcut"]
    assert list(decoupled) == list(mixed_bank)
    assert list(decoupled["neon"].guards) == [*mixed_bank["neon"].guards, "woodcut"]


def test_what_is_made_from_a_name_is_decoupled_with_its_adapter(pipe):
    """Its prompts are those of its kind, which the bank does not hold; what stands for it without a gate follows."""
    trainer = SepMETrainer(pipe, guards=["watermark"], regular=100)
    grown = trainer.erase(["neon"], trainer.erase(["pencil"], kind="style"), kind="style")
    decoupled = decouple(grown, pipe)
    assert decoupled["pencil"].concept == grown["pencil"].concept
    assert decoupled.guarantees["neon"].by == "null space"
    tokens = encode(pipe, ["neon"])
    before, after = (bank["pencil"].adapter for bank in (grown, decoupled))
    assert float(leakage(before, tokens)) > 1e-4
    assert float(leakage(after, tokens)) < 1e-5
    assert decoupled["pencil"].metrics["adapter_leakage"] < 1e-5
    own = encode(pipe, ["a cat in the style of pencil"])
    assert float(after.reading(own)) > 0.8 * float(before.reading(own))


def test_it_says_what_it_cost(pipe, mixed_bank, decoupled):
    """The share of the change of the concept's own keys and values that is left, of the tokens that count."""
    weights = projection_weights(pipe.unet)
    for name in ("neon", "cat", "pencil"):
        e = EmbeddedConcept.of(mixed_bank[name].concept, Encoded(pipe)).rows.double()
        old, new = (bank[name].increment.delta_weights(weights) for bank in (mixed_bank, decoupled))
        pairs = [(e @ old[m].double().T, e @ new[m].double().T) for m in weights]
        share = sum((a * b).sum() for a, b in pairs) / sum((a * a).sum() for a, _ in pairs)
        assert decoupled[name].metrics["effect_kept"] == pytest.approx(float(share), abs=1e-4)
        assert 0.1 < share <= 1
        assert decoupled[name].metrics["decoupled_from"] == ["woodcut"]


def test_a_decoupled_bank_survives_the_disk(decoupled, tmp_path):
    decoupled.save_pretrained(tmp_path / "bank")
    back = ConceptBank.from_pretrained(tmp_path / "bank")
    assert back["neon"].metrics == decoupled["neon"].metrics
    assert torch.equal(back["neon"].increment.A, decoupled["neon"].increment.A)


def test_a_newcomer_that_takes_everything_is_refused(pipe):
    """Named as the concept's only prompt, it leaves no direction; nothing is half done."""
    bank = SepMETrainer(pipe, CLOSED).erase([CONCEPTS[2]])
    same = Concept("a pencil picture of a fox", (("a fox", ""),))
    grown = SepMETrainer(pipe, replace(CLOSED, rank=2)).erase([same], bank)
    with pytest.raises(ValueError, match=r"nothing would be left of the increment of 'pencil'"):
        decouple(grown, pipe)


def test_a_bank_of_another_base_is_refused(mixed_bank):
    with pytest.raises(ValueError, match="other weights"):
        decouple(mixed_bank, random_pipeline(seed=9))


def test_a_gate_stays_at_the_same_share_of_what_the_own_prompts_read(pipe):
    """The projection takes from what an increment reads; a gate left where it was could stay shut: fail open."""
    trainer = SepMETrainer(pipe, replace(CLOSED, gate=0.5))
    bank = trainer.erase(CONCEPTS[:1])
    grown = decouple(trainer.erase(CONCEPTS[1:], bank), pipe)
    own = encode(pipe, CONCEPTS[0].prompts)
    old, new = bank["neon"].increment, grown["neon"].increment
    assert not torch.equal(new.A, old.A)
    assert new.gate == pytest.approx(0.5 * float(new.reading(own).min()))
