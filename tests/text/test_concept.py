import time

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


def test_the_papers_choice_by_name():
    assert Concept.paper("Van Gogh") == Concept("Van Gogh")


def test_a_concept_of_a_kind_has_no_prompts_until_a_text_encoder_is_known():
    concept = Concept.style("Van Gogh", aliases=["Vincent van Gogh"])
    assert (concept.kind, concept.aliases, concept.pairs) == ("style", ("Vincent van Gogh",), ())
    assert [Concept.object("gun").kind, Concept.person("x").kind, Concept.content("nudity").kind] == [
        "object",
        "person",
        "content",
    ]


def test_a_bare_name_without_a_kind_is_refused_with_the_calls():
    with pytest.raises(ValueError, match=r"erase\(\['Van Gogh'\], kind='style'\).*Concept.paper\('Van Gogh'\)"):
        as_concepts(["Van Gogh"])
    assert as_concepts(["Van Gogh"], "style") == [Concept.style("Van Gogh")]


@pytest.mark.parametrize("aliases", [("",), ("Vincent", "vincent"), ("VAN GOGH",), ("a\nb",)])
def test_unusable_aliases_are_refused(aliases):
    with pytest.raises(ValueError, match=r"alias of 'Van Gogh' needs|names given twice"):
        Concept.style("Van Gogh", aliases=aliases)


def test_an_alias_that_names_another_concept_is_refused():
    with pytest.raises(ValueError, match=r"\['dog'\] cannot be aliases of 'cat'"):
        as_concepts([Concept.object("cat", aliases=["dog"]), Concept.object("Dog")])


def test_only_a_concepts_own_names_are_spelled():
    with pytest.raises(ValueError, match=r"'nudity' is not called \['cat'\]"):
        Concept("nudity", kind="content", aliases=("nude",), spelled=("cat",))


def test_a_concept_of_a_kind_is_read_back():
    concept = Concept("nudity", kind="content", aliases=("nude", "bare"), spelled=("nudity", "nude"))
    assert Concept.from_dict(concept.to_dict()) == concept


def test_template_pairs_each_prompt_with_itself_without_the_concept():
    concept = Concept.from_template("neon", ["{concept} cat", "a dog in {concept}"], ["cat", "a dog"])
    assert concept.pairs == (("neon cat", "cat"), ("a dog in neon", "a dog"))


def test_template_without_slot_is_refused():
    with pytest.raises(ValueError, match=r"templates without '\{concept\}'"):
        Concept.from_template("neon", "a cat", "a cat")


@pytest.mark.parametrize("name", ["", "   ", "a\nb", "a\x00", "\u3164", "\u2800\ufe0f "])
def test_unusable_names_are_refused(name):
    with pytest.raises(ValueError, match="printable, non-empty name"):
        Concept(name)


def test_anchors_must_match_pairs():
    with pytest.raises(ValueError, match="2 pairs but anchors for 1"):
        Concept("neon", (("neon cat", "cat"), ("neon dog", "dog")), anchors=(("cat",),))


def test_a_name_that_no_bank_can_hold_is_refused_with_its_length():
    assert Concept("a" * 200).name == "a" * 200
    with pytest.raises(ValueError, match="at most 200 characters, not 201"):
        Concept("a" * 201)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("Van Gogh", "van-gogh"),
        ("Café  №1", "cafe-no1"),
        ("猫", "concept"),
        ("CON", "con-concept"),
        ("nul", "nul-concept"),
        ("LPT³", "lpt3-concept"),
        ("Conan", "conan"),
        ("㍿㎯" * 100, None),
    ],
)
def test_slug_is_a_safe_folder_name(name, slug):
    found = Concept(name).slug
    assert slug in (found, None)
    assert 0 < len(found) <= 100
    assert not found.startswith("-")
    assert not found.endswith("-")


def test_round_trip():
    concept = Concept("neon", (("neon cat", "cat"),), (("red cat", "blue cat"),))
    assert Concept.from_dict(concept.to_dict()) == concept


def test_one_string_is_not_a_list_of_letters():
    with pytest.raises(TypeError, match=r"\['nudity'\]"):
        as_concepts("nudity")


def test_a_concept_twice_is_refused():
    with pytest.raises(ValueError, match="given twice: \\['neon'\\]"):
        as_concepts(["neon", Concept("neon")], "style")


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
        ("neon", "neon\ufe0f"),  # from here on invisible characters
        ("neon", "neon\u3164"),
        ("neon", "neon\u2800"),
        ("neon", "ne\u034fon"),
        ("neon", "\u115fneon"),
        ("neon", "neo\u17b4n"),
        ("neon", "neon\U000e0100"),
        ("neon", "nꬲon"),  # from here on letters that the hand-made table lacked
        ("Neon", "Nᴇᴏɴ".replace("ᴇ", "е").replace("ɴ", "n")),
        ("logo", "1ogo"),
        ("modern", "modem"),
        ("Ice", "lce"),
    ],
)
def test_look_alikes_are_found(name, twin):
    assert look_alikes([name, "other", twin]) == [(name, twin)]


def test_names_that_differ_to_the_eye_are_no_look_alikes():
    assert not look_alikes(
        ["neon", "neon!", "noen", "Monet", "Manet", "猫", "犬", "café", "cafe", "hot", "нот", "Style 1", "Style 2"]
    )
    assert not look_alikes(["VanGogh", "Van Gogh", "👩", "🎨", "❤️", "💙"])


def test_a_name_may_look_like_two_others():
    """Ice is ice but for its case, and lce but for a letter that is drawn the same in capitals."""
    assert look_alikes(["ice", "lce", "other", "Ice"]) == [("ice", "Ice"), ("lce", "Ice")]


@pytest.mark.parametrize("alike", [False, True])
def test_ten_thousand_names_are_compared_at_once(alike):
    """Names of others' banks, too, which may all be alike."""
    names = ["neon" + "\ufe0f" * (i % 90) if alike else f"name {i}" for i in range(10_000)]
    began = time.perf_counter()
    assert bool(look_alikes(names)) == alike
    assert time.perf_counter() - began < 5
