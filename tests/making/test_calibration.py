"""Gates between what a concept's own prompts read and what regular prompts read."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import Concept, Increment, SepMETrainer, SoftGuards
from sepme_diffusers.making.calibration import RegularRows, best_weight, calibrated, made_for, share_bound
from small import CLOSED, latents

READS_FIRST = Increment(torch.eye(4)[:1], B=torch.ones(4, 1))


def prompts(*firsts):
    """Prompts of two tokens, one of which is the same in all; the other is read as the number given."""
    return torch.stack([torch.tensor([[0.0, 5, 5, 5], [first, 1, 0, 0]]) for first in firsts])


def regular(*firsts):
    return RegularRows.of(prompts(*firsts))


def test_the_gate_is_two_thirds_of_the_way():
    increment, said = calibrated(READS_FIRST, prompts(*[8.0] * 20), regular(2.0, -1.0, 2.0), "cat")
    assert increment.gate == pytest.approx(6.0)
    assert (said["own_reading"], said["regular_reading"]) == (8.0, 2.0)
    assert (said["own_reached"], said["regular_moved"], said["regular_prompts"]) == (1.0, 0.0, 3)


def test_a_few_own_prompts_that_hardly_read_do_not_lower_the_gate():
    increment, said = calibrated(READS_FIRST, prompts(*[8.0] * 19, 0.5), regular(2.0), "cat")
    assert increment.gate == pytest.approx(6.0)
    assert said["own_reached"] == pytest.approx(0.95)


def test_where_they_overlap_there_is_no_gate_and_a_warning(caplog):
    increment, said = calibrated(READS_FIRST, prompts(6.0), regular(9.0, 0.0), "cat")
    assert increment.gate is None
    assert said["regular_moved"] == 0.5
    assert "no gate for 'cat': 100% of its own prompts" in caplog.text


def test_the_warning_names_the_prompts_that_read_least_and_do_not_spell_it(caplog):
    own, spelled = prompts(3.0, 8.0, 1.0, 0.5, 2.0, 2.5), torch.tensor([False, False, False, True, False, False])
    names = ["three", "eight", "one", "spelled", "two", "more"]
    assert calibrated(READS_FIRST, own, regular(7.0), "cat", spelled, names)[0].gate is None
    assert "do not spell it, such as ['one', 'two', 'more'] and 1 more. So it acts on all prompts" in caplog.text


def test_prompts_that_spell_the_concept_need_not_be_told_from_regular_ones(caplog):
    """They open any gate; so it leaves every regular prompt alone, however little some own ones read."""
    own, spelled = prompts(*[8.0] * 10, *[0.5] * 10), torch.tensor([False] * 10 + [True] * 10)
    increment, said = calibrated(READS_FIRST, own, regular(2.0, 1.0), "cat", spelled)
    assert increment.gate == pytest.approx(6.0)
    assert (said["own_reading"], said["own_reached"], said["regular_moved"]) == (8.0, 0.5, 0.0)
    increment, said = calibrated(READS_FIRST, prompts(6.0), regular(9.0, 0.0), "cat", torch.tensor([True]))
    assert increment.gate > 9
    assert (said["own_reached"], said["regular_moved"]) == (0.0, 0.0)
    assert not caplog.text
    assert calibrated(READS_FIRST, own, regular(2.0), "cat", ~spelled)[0].gate is None


def test_an_increment_that_reads_nothing_of_its_own_is_refused():
    with pytest.raises(ValueError, match="reads nothing in its own prompts"):
        calibrated(READS_FIRST, prompts(0.0), regular(1.0), "cat")


def test_rows_of_several_parts_are_joined():
    parts = [regular(1.0, 2.0), regular(7.0), regular(3.0)]
    joined = parts[0].joined(*parts[1:])
    assert joined.readings(READS_FIRST).tolist() == [1.0, 2.0, 7.0, 3.0]
    assert parts[1].joined().readings(READS_FIRST).tolist() == [7.0]


def test_rows_that_repeat_are_kept_once():
    rows = regular(2.0, -1.0, 2.0)
    assert len(rows.rows) == 3
    assert rows.readings(READS_FIRST).tolist() == [2.0, 1.0, 2.0]
    assert rows.only([1]).readings(READS_FIRST).tolist() == [1.0]
    assert rows.only([1]).joined(regular(4.0)).readings(READS_FIRST).tolist() == [1.0, 4.0]


def test_of_weights_that_do_as_well_the_largest_is_chosen():
    leak = {1.0: 4.0, 10.0: 1.0, 100.0: 1.05, 1000.0: 2.0}

    def solved(weight):
        return Increment(torch.tensor([[1.0, leak[weight], 0, 0]]), B=torch.ones(4, 1))

    assert best_weight(solved, prompts(8.0), regular(0.0), tuple(leak)) == 100.0


@pytest.mark.parametrize(("count", "of", "bound"), [(0, 300, 0.0099), (0, 600, 0.0050), (1, 100, 0.0466), (5, 5, 1.0)])
def test_bounds_are_those_of_clopper_and_pearson(count, of, bound):
    assert share_bound(count, of) == pytest.approx(bound, abs=1e-4)


def test_some_of_many_prompts_are_held_out():
    assert made_for(9) == list(range(9))
    assert made_for(10) == [0, 1, 2, 3, 5, 6, 7, 8]


def test_the_trainer_calibrates_by_regular_prompts_that_it_does_not_solve_with(pipe):
    """Those that name the concept do not count; others leave the gate shut, to the bit."""
    concept = Concept.from_template(
        "cat", [f"a {word} {{concept}}" for word in WORDS], [f"a {word}" for word in WORDS]
    )
    guards = SoftGuards.from_prompts(
        pipe, ["a dog", "a big bus"], held_out=["a red cat", "a house in the rain", "a fox"]
    )
    config = replace(CLOSED, rank=1, gate="calibrated", soft_guard_weight=3.0)
    bank = SepMETrainer(pipe, config, regular=guards).erase([concept])
    metrics, gate = bank["cat"].metrics, bank["cat"].increment.gate
    assert metrics["regular_prompts"] == 2
    assert metrics["regular_reading"] < gate < metrics["own_reading"]
    kept = list(guards.held_out[1:])
    before, own = latents(pipe, kept), latents(pipe, "a old cat")
    pipe.load_sepme(bank)
    assert torch.equal(latents(pipe, kept, erased=["cat"]), before)
    assert not torch.equal(latents(pipe, "a old cat", erased=["cat"]), own)


WORDS = ["red", "old", "big", "blue", "dark", "green", "small", "new", "cold", "white"]


@pytest.mark.parametrize("few", [(), ["a dog", "a bus"]])
def test_without_regular_prompts_nothing_can_be_calibrated(pipe, few):
    with pytest.raises(ValueError, match="to calibrate takes regular prompts, ten or more"):
        SepMETrainer(pipe, regular=few)
