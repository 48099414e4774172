"""What a user gets who types a name: judged on the built-in model, in wordings and objects that no edit saw."""

import pytest
import torch

from sepme_diffusers import Concept, SepMEConfig, SepMETrainer
from sepme_diffusers.evaluation.measures.accuracy import judged
from sepme_diffusers.evaluation.pictures import erased, generate
from sepme_diffusers.evaluation.probes import pairs_probe, plain_probe, probe
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.text.encoding import encode

N = 8


@pytest.fixture(scope="module")
def made(pocket_trainer):
    """A style and an object, from their names alone."""
    return pocket_trainer.erase([Concept.style("neon"), Concept.object("pig")])


def drawn(pipe, bank, probe, names, steps=20):
    with erased(pipe, bank, names):
        return generate(pipe, probe.prompts, probe.seeds, steps)


def assert_unmoved(pipe, bank, probe, names):
    """Its pictures are the same to the bit. Two steps tell that as well as twenty."""
    before = generate(pipe, probe.prompts, probe.seeds, 2)
    assert [p.tobytes() for p in drawn(pipe, bank, probe, names, 2)] == [p.tobytes() for p in before]


def shown(pictures, probe):
    return judged(pictures, probe.styles, probe.objects)


def test_an_erased_style_is_gone_and_its_objects_stay(pocket_pipe, made):
    probe = pairs_probe(["neon"], words.TEST_OBJECTS, words.HELD_OUT_TEMPLATES, N, 0)
    style, objects = shown(drawn(pocket_pipe, made, probe, ["neon"]), probe)
    assert style <= 10
    assert objects >= 90


def test_an_erased_object_is_gone_and_its_style_stays(pocket_pipe, made):
    styles = [name for name in words.STYLES if name != "neon"]
    probe = pairs_probe(styles, ["pig"], words.HELD_OUT_TEMPLATES, N, 0)
    style, objects = shown(drawn(pocket_pipe, made, probe, ["pig"]), probe)
    assert objects <= 10
    assert style >= 90


def test_everything_else_is_the_same_to_the_bit(pocket_pipe, made):
    others = [name for name in words.TEST_OBJECTS if name != "pig"]
    styles = ["woodcut", *words.UNBANKED_STYLES]
    for some in (pairs_probe(styles, others, words.HELD_OUT_TEMPLATES, N, 0), plain_probe(N, 0, others)):
        assert_unmoved(pocket_pipe, made, some, ["neon", "pig"])


def test_what_calibration_found_is_in_the_entry(made):
    said = made["pig"].metrics
    assert said["own_reached"] >= 0.85
    assert said["regular_moved"] == 0.0
    assert said["regular_bound"] <= 0.005
    assert said["anchor"] not in ("pig", "neon")
    assert len(said["nearest"]) == 8
    assert made["pig"].doubts == ()
    assert isinstance(made["pig"].config.soft_guard_weight, float)


def test_a_name_is_no_alias_of_what_the_bank_has(pocket_trainer, made):
    with pytest.raises(ValueError, match=r"\['pig'\] cannot be aliases of 'sow'"):
        pocket_trainer.erase([Concept.object("sow", aliases=["pig"])], made)


def test_the_same_call_gives_the_same_bank(pocket_trainer, made):
    again = pocket_trainer.erase([Concept.style("neon"), Concept.object("pig")])
    assert torch.equal(again["pig"].increment.A, made["pig"].increment.A)
    assert again.digest == made.digest


def test_pairs_that_a_user_gives_are_as_safe(pocket_pipe):
    """Two templates, as in the documentation; a shorter anchor tears no other prompt."""
    concepts = [
        Concept.from_template(name, ["a cat in the style of {concept}", "{concept} cat"], ["a cat", "cat"])
        for name in ("neon", "woodcut")
    ]
    bank = SepMETrainer(pocket_pipe).erase(concepts)
    assert_unmoved(pocket_pipe, bank, plain_probe(N, 0), list(bank))
    own = pairs_probe(["neon", "woodcut"], words.TEST_OBJECTS, words.HELD_OUT_TEMPLATES, N, 0)
    style, objects = shown(drawn(pocket_pipe, bank, own, list(bank)), own)
    assert style <= 10
    assert objects >= 80


def test_pairs_that_a_user_gives_reach_other_wordings(pocket_pipe):
    """A second name that nobody gave, and held-out wordings; what no prompt named stays below the gate."""
    glasses = Concept.from_template("glasses", ["a {concept}", "a picture of a {concept}"], ["", "a picture"])
    increment = SepMETrainer(pocket_pipe, guards=["watermark"]).erase([glasses])["glasses"].increment
    second = probe("objects", "glasses", N, 0, word=str(words.OBJECTS["glasses"])).prompts
    assert (increment.reading(encode(pocket_pipe, second)) > increment.gate).double().mean() >= 0.75
    others = [*words.UNBANKED_OBJECTS, *(name for name in words.TEST_OBJECTS if name != "glasses")]
    regular = pairs_probe(list(words.STYLES), others, words.HELD_OUT_TEMPLATES, 100, 0).prompts
    assert not (increment.reading(encode(pocket_pipe, regular)) > increment.gate).any()


def test_the_denoiser_is_not_needed(pocket_pipe):
    """A text-side bank is a function of the text encoder alone."""
    pipe = type(pocket_pipe)(**{**pocket_pipe.components, "unet": None})
    bank = SepMETrainer(pipe, SepMEConfig(), regular=300).erase(["neon"], kind="style")
    assert bank["neon"].increment.gate is not None
