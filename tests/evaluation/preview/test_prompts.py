"""Which prompts are drawn for a concept."""

from dataclasses import replace

import pytest

from sepme_diffusers import Concept, pocket
from sepme_diffusers.evaluation.preview.prompts import prompts_of
from sepme_diffusers.making.calibration import made_for
from sepme_diffusers.making.kinds.wording import described
from sepme_diffusers.text.spelling import mentions

KNOWN = Concept("neon", kind="style", aliases=("glowing", "luminous"))


def sorted_out(asked, sort):
    return [one for one in asked if one.sort == sort]


@pytest.fixture
def named_bank():
    """A bank with a concept that is described by its kind, as `erase(["neon"], kind="style")` makes it."""
    bank = pocket.bank("styles")
    metrics = {"own_reached": 1.0, "nearest": ["chalk", "thermal", "popart", "pixel"]}
    return bank.with_entries([replace(bank["neon"], concept=KNOWN, metrics=metrics)])


def test_a_concept_of_a_kind_is_shown_by_held_out_prompts(pocket_pipe, named_bank):
    own = sorted_out(prompts_of(pocket_pipe, named_bank, "neon", 3), "own")
    pairs = described(KNOWN, pocket_pipe, None).concept.pairs
    made = {pairs[index][0] for index in made_for(len(pairs))}
    assert len(own) == 3
    assert all(one.held_out and one.prompt not in made and mentions(one.prompt, ["neon"]) for one in own)
    assert {one.prompt: one.without for one in own}.items() <= dict(pairs).items()


def test_second_names_and_neighbours_stand_where_the_name_stood(pocket_pipe, named_bank):
    asked = prompts_of(pocket_pipe, named_bank, "neon", 2)
    aliases, near = sorted_out(asked, "alias"), sorted_out(asked, "neighbour")
    own = sorted_out(asked, "own")[0]
    assert [one.prompt for one in aliases] == [own.prompt.replace("neon", alias) for alias in KNOWN.aliases]
    assert [one.prompt for one in near] == [own.prompt.replace("neon", other) for other in ("chalk", "thermal")]
    assert {one.without for one in (*aliases, *near)} == {own.without}


def test_without_known_neighbours_they_are_the_nearest_names_of_the_bank(pocket_pipe):
    near = sorted_out(prompts_of(pocket_pipe, pocket.bank("objects"), "cat", 2), "neighbour")
    named = [name for one in near for name in pocket.objects if mentions(one.prompt, [name])]
    assert len(named) == 2
    assert "cat" not in named


def test_regular_prompts_do_not_name_the_concept(pocket_pipe, named_bank):
    regular = sorted_out(prompts_of(pocket_pipe, named_bank, "neon", 20), "regular")
    assert len(regular) == 20
    assert not any(mentions(one.prompt, ["neon", *KNOWN.aliases]) for one in regular)
    assert {one.without for one in regular} == {None}


def test_no_prompt_is_drawn_twice_and_a_bank_of_one_has_no_neighbours(pipe, text_bank):
    asked = prompts_of(pipe, text_bank.subset(["neon"]), "neon", 9)
    assert len({one.prompt for one in asked}) == len(asked)
    assert [one.prompt for one in sorted_out(asked, "own")] == ["a cat in the style of neon", "neon dog"]
    assert not sorted_out(asked, "neighbour")


def test_a_concept_whose_prompts_do_not_name_it_lends_its_place_to_bare_names(pipe, text_bank):
    concept = Concept("glow", (("a bright cat", "a cat"),), aliases=("shine",))
    entry = replace(text_bank["neon"], concept=concept)
    asked = prompts_of(pipe, text_bank.with_entries([entry]), "glow", 1)
    assert [(one.prompt, one.without) for one in sorted_out(asked, "alias")] == [("shine", "")]
