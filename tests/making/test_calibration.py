"""Gates between what a concept's own prompts read and what regular prompts read."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept, Increment, SepMETrainer
from sepme_diffusers.making.calibration import calibrated, distinct_rows, made_for
from small import CLOSED, latents

READS_FIRST = Increment(torch.eye(4)[:1], B=torch.ones(4, 1))


def prompts(*firsts):
    """Prompts of two tokens, one of which is the same in all; the other is read as the number given."""
    return torch.stack([torch.tensor([[0.0, 5, 5, 5], [first, 1, 0, 0]]) for first in firsts])


def test_the_gate_is_in_the_middle():
    increment, readings = calibrated(READS_FIRST, prompts(8.0, 6.0), distinct_rows(prompts(2.0, -1.0, 2.0)))
    assert increment.gate == 4.0
    assert readings == {"own_reading": 6.0, "regular_reading": 2.0}


def test_its_own_prompts_open_the_gate_whatever_regular_ones_read():
    increment, readings = calibrated(READS_FIRST, prompts(6.0), distinct_rows(prompts(9.0)))
    assert increment.gate == pytest.approx(5.4)
    assert readings["regular_reading"] == 9.0


def test_rows_that_repeat_are_dropped():
    assert len(distinct_rows(prompts(2.0, -1.0, 2.0))) == 3


def test_some_of_many_prompts_are_held_out():
    assert made_for(9) == list(range(9))
    assert made_for(10) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_the_trainer_calibrates_by_its_soft_guards(pipe):
    """Those that name the concept do not count; others leave the gate shut, to the bit."""
    concept = Concept.from_template(
        "cat", [f"a {word} {{concept}}" for word in WORDS], [f"a {word}" for word in WORDS]
    )
    regular = ["a dog", "a big bus", "a red cat", "a house in the rain"]
    config = replace(CLOSED, rank=1, gate="calibrated", soft_guard_weight=3.0)
    entry = SepMETrainer(pipe, config, regular=regular).erase([concept])["cat"]
    metrics, gate = entry.metrics, entry.increment.gate
    assert metrics["regular_reading"] < gate < metrics["own_reading"]
    bank = SepMETrainer(pipe, config, regular=regular).erase([concept])
    before, own = latents(pipe, regular[:2]), latents(pipe, "a old cat")
    pipe.load_sepme(bank)
    assert torch.equal(latents(pipe, regular[:2], erased=["cat"]), before)
    assert not torch.equal(latents(pipe, "a old cat", erased=["cat"]), own)


WORDS = ["red", "old", "big", "blue", "dark", "green", "small", "new", "cold", "white"]


def test_without_regular_prompts_nothing_can_be_calibrated(pipe):
    with pytest.raises(ValueError, match="gate='calibrated' needs regular prompts"):
        SepMETrainer(pipe, replace(CLOSED, gate="calibrated"))
