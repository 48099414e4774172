import pytest
import torch

from sepme_diffusers import Concept
from sepme_diffusers.text.concept import as_concepts
from sepme_diffusers.text.encoding import encode, rows
from sepme_diffusers.text.spelling import look_alikes


def test_bare_name_is_the_papers_choice():
    concept = Concept("Van Gogh")
    assert concept.pairs == (("Van Gogh", ""),)
    assert concept.anchors == (("",),)


def test_template_pairs_each_prompt_with_itself_without_the_concept():
    concept = Concept.from_template("neon", ["{concept} cat", "a dog in {concept}"], ["cat", "a dog"])
    assert concept.pairs == (("neon cat", "cat"), ("a dog in neon", "a dog"))


def test_template_without_slot_is_refused():
    with pytest.raises(ValueError, match=r"templates without '\{concept\}'"):
        Concept.from_template("neon", "a cat", "a cat")


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "a\x00"])
def test_unusable_names_are_refused(name):
    with pytest.raises(ValueError, match="printable, non-empty name"):
        Concept(name)


def test_anchors_must_match_pairs():
    with pytest.raises(ValueError, match="2 pairs but anchors for 1"):
        Concept("neon", (("neon cat", "cat"), ("neon dog", "dog")), anchors=(("cat",),))


@pytest.mark.parametrize(("name", "slug"), [("Van Gogh", "van-gogh"), ("Café  №1", "cafe-no1"), ("猫", "concept")])
def test_slug_is_a_safe_folder_name(name, slug):
    assert Concept(name).slug == slug


def test_round_trip():
    concept = Concept("neon", (("neon cat", "cat"),), (("red cat", "blue cat"),))
    assert Concept.from_dict(concept.to_dict()) == concept


def test_one_string_is_not_a_list_of_letters():
    with pytest.raises(TypeError, match=r"\['nudity'\]"):
        as_concepts("nudity")


def test_a_concept_twice_is_refused():
    with pytest.raises(ValueError, match="given twice: \\['neon'\\]"):
        as_concepts(["neon", Concept("neon")])


def test_encode_gives_what_the_unet_reads(pipe):
    prompts = ["", "a cat", "neon"]
    found = encode(pipe, prompts, batch_size=2)
    ids = pipe.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(ids).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert rows(found).shape == (3 * 16, 384)


@pytest.mark.parametrize(
    ("name", "twin"),
    [
        ("neon", "Neon"),
        ("neon", "ｎｅｏｎ"),
        ("neon", "nеon"),  # Cyrillic е
        ("Van Gogh", "Van  Gogh"),
        ("Café", "Cafe\u0301"),
        ("Straße", "STRASSE"),
        ("KATE", "КАТЕ"),  # Cyrillic throughout
    ],
)
def test_look_alikes_are_found(name, twin):
    assert look_alikes([name, "other", twin]) == [(name, twin)]


def test_names_that_differ_to_the_eye_are_no_look_alikes():
    assert not look_alikes(["neon", "neon!", "noen", "Monet", "Manet", "猫", "犬", "café", "cafe", "hot", "нот"])
