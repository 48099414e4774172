"""Regular prompts: encoded once, kept, resumed; and the neighbours of a concept."""

import os

import pytest
import torch

from sepme_diffusers import Concept, Increment, SoftGuards, pocket
from sepme_diffusers.making import regular
from sepme_diffusers.making.regular import Regular, lexicon_of, regular_guards, regular_prompts
from sepme_diffusers.text.encoding import Encoded
from sepme_diffusers.text.lexicon import Lexicon


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEPME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def encodings(monkeypatch):
    """How many prompts were encoded."""
    counted = []
    plain = SoftGuards.from_prompts.__func__

    def counting(cls, pipe, prompts, held_out=None):
        counted.append(len(prompts))
        return plain(cls, pipe, prompts, held_out)

    monkeypatch.setattr(SoftGuards, "from_prompts", classmethod(counting))
    return counted


def test_a_models_folder_may_bring_a_lexicon(pipe, pocket_pipe):
    assert lexicon_of(pipe) is Lexicon.everyday()
    assert set(lexicon_of(pocket_pipe).words) == {"subject", "style"}


def test_sizes_are_nested_and_nothing_that_calibrates_is_solved_with():
    lexicon = Lexicon.everyday()
    (few, held_out), (many, more) = (regular_prompts(lexicon, size) for size in (300, 1000))
    assert (len(few), len(held_out), len(more)) == (300, 75, 250)
    assert many[:300] == few
    assert more[:75] == held_out
    assert not set(many) & set(more)


def test_what_was_encoded_is_kept(pipe, cache, encodings):
    made = regular_guards(pipe, 100)
    assert sum(encodings) == 100
    again = regular_guards(pipe, 100)
    assert sum(encodings) == 100
    assert (again.prompts, again.held_out) == (made.prompts, made.held_out)
    assert torch.allclose(again.covariance.double(), made.covariance.double(), rtol=1e-5, atol=1e-6)


def test_more_are_added_to_what_is_there(pipe, cache, encodings):
    regular_guards(pipe, 100)
    grown = regular_guards(pipe, 150)
    assert sum(encodings) == 150
    whole = SoftGuards.from_prompts(pipe, grown.prompts, ())
    assert torch.allclose(grown.covariance.double(), whole.covariance, rtol=1e-4, atol=1e-5)


def test_an_interrupted_run_goes_on(pipe, cache, encodings, monkeypatch):
    monkeypatch.setattr(regular, "_SAVED_EVERY", 0.0)
    plain, calls = SoftGuards.joined, []

    def interrupted(self, other):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, other)

    monkeypatch.setattr(SoftGuards, "joined", interrupted)
    with pytest.raises(KeyboardInterrupt):
        regular_guards(pipe, 300)
    monkeypatch.setattr(SoftGuards, "joined", plain)
    encodings.clear()
    assert len(regular_guards(pipe, 300).prompts) == 300
    assert sum(encodings) == 300 - 3 * 64


def test_a_damaged_file_is_made_anew(pipe, cache, encodings):
    regular_guards(pipe, 64)
    [file] = cache.iterdir()
    file.write_bytes(b"nothing")
    assert len(regular_guards(pipe, 64).prompts) == 64
    assert sum(encodings) == 128


def test_another_text_encoder_has_a_file_of_its_own(pipe, cache):
    regular_guards(pipe, 64)
    with torch.no_grad():
        next(pipe.text_encoder.parameters()).mul_(1.5)
    regular_guards(pipe, 64)
    assert len(os.listdir(cache)) == 2


def test_a_slow_text_encoder_gets_fewer(pipe, cache, monkeypatch):
    """At a second per prompt ten minutes are enough for 300."""
    now = [0.0]
    plain = SoftGuards.from_prompts.__func__

    def slow(cls, pipe, prompts, held_out=None):
        now[0] += len(prompts)
        return plain(cls, pipe, prompts, held_out)

    monkeypatch.setattr(SoftGuards, "from_prompts", classmethod(slow))
    monkeypatch.setattr(regular.time, "monotonic", lambda: now[0])
    guards = regular_guards(pipe)
    assert (len(guards.prompts), len(guards.held_out)) == (300, 75)


def test_a_slow_text_encoder_has_the_same_ones_next_time(pipe, cache, monkeypatch):
    """A run that finds as many as there is time for adds none; a faster machine adds to them."""
    monkeypatch.setattr(regular, "SIZES", (100, 200))
    regular_guards(pipe, 100)
    monkeypatch.setattr(regular, "_affordable_now", lambda pipe, prompts: 100)
    found = regular_guards(pipe)
    assert (len(found.prompts), len(found.held_out)) == (100, 25)
    assert found.prompts == regular_guards(pipe).prompts
    monkeypatch.setattr(regular, "_affordable_now", lambda pipe, prompts: 200)
    assert len(regular_guards(pipe).prompts) == 200


def test_the_names_among_which_neighbours_are_sought_are_encoded_once(pocket_pipe, cache, monkeypatch):
    encoded, lexicon = Encoded(pocket_pipe), lexicon_of(pocket_pipe)
    soft = SoftGuards.from_prompts(pocket_pipe, lexicon.prompts(40))
    first = Regular(pocket_pipe, encoded, soft, lexicon).neighbours(Concept.style("woodcut"))
    [file] = cache.iterdir()
    plain, asked = regular._means, []
    monkeypatch.setattr(regular, "_means", lambda pipe, names: asked.extend(names) or plain(pipe, names))
    assert Regular(pocket_pipe, encoded, soft, lexicon).neighbours(Concept.style("woodcut")) == first
    assert asked == ["woodcut"]
    file.write_bytes(b"nothing")
    assert Regular(pocket_pipe, encoded, soft, lexicon).neighbours(Concept.style("woodcut")) == first
    assert len(asked) > 2


def test_prompts_to_calibrate_by_push_no_others_out_of_memory(pocket_pipe):
    """Their rows are kept; their embeddings would be kept twice."""
    encoded = Encoded(pocket_pipe)
    soft = SoftGuards.from_prompts(pocket_pipe, ["a dog"], held_out=[f"a {name}" for name in pocket.objects])
    rows = Regular(pocket_pipe, encoded, soft).rows(Concept("neon"))
    assert len(rows.where) == len(pocket.objects)
    assert encoded._known.each == 0
    increment = Increment(torch.eye(rows.rows.shape[1])[:2], B=torch.zeros(rows.rows.shape[1], 2))
    expected = increment.reading(encoded(soft.held_out))
    torch.testing.assert_close(rows.readings(increment).double(), expected, rtol=1e-5, atol=1e-6)


def test_neighbours_are_of_the_concepts_kind_and_not_its_own_names(pocket_pipe):
    encoded, lexicon = Encoded(pocket_pipe), lexicon_of(pocket_pipe)
    soft = SoftGuards.from_prompts(pocket_pipe, lexicon.prompts(40))
    near = Regular(pocket_pipe, encoded, soft, lexicon).neighbours(Concept.object("cat", aliases=["dog"]))
    assert len(near) == 8
    assert not {"cat", "dog"} & set(near)
    assert set(near) <= set(lexicon.names("subject"))


def test_neighbours_cost_more_than_other_regular_prompts(pocket_pipe):
    """What is near to a concept is protected even where the corpus hardly mentions it."""
    encoded, lexicon = Encoded(pocket_pipe), lexicon_of(pocket_pipe)
    soft = SoftGuards.from_prompts(pocket_pipe, lexicon.prompts(40))
    concept = Concept.style("woodcut")
    weighed = Regular(pocket_pipe, encoded, soft, lexicon)
    near = encoded([f"a cat in the style of {weighed.neighbours(concept)[0]}"])[0].double()
    costs = [
        float((near @ each.covariance(concept) * near).sum())
        for each in (weighed, Regular(pocket_pipe, encoded, soft))
    ]
    assert costs[0] > 1.5 * costs[1]


def test_prompts_that_name_the_concept_do_not_calibrate(pocket_pipe):
    soft = SoftGuards.from_prompts(pocket_pipe, ["a dog"], held_out=["a cat", "a fox", "a kitty"])
    rows = Regular(pocket_pipe, Encoded(pocket_pipe), soft).rows(Concept("cat", aliases=("kitty",)))
    assert len(rows.where) == 1
