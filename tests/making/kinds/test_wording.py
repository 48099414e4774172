"""The prompts in which a concept shows, for one text encoder."""

import pytest
from transformers import CLIPTokenizer

from sepme_diffusers import Concept
from sepme_diffusers.making.calibration import made_for
from sepme_diffusers.making.kinds import find_kind
from sepme_diffusers.making.kinds.wording import in_company, word_concept
from sepme_diffusers.text.encoding import Encoded
from sepme_diffusers.text.spelling import mentions


def worded(concept, tokenizer=None, **settings):
    return word_concept(concept, find_kind(concept.kind), tokenizer, **settings)


@pytest.mark.parametrize(
    "concept",
    [Concept.style("Van Gogh"), Concept.object("gun"), Concept.person("Ada Lovelace"), Concept.content("nudity")],
)
def test_every_prompt_names_the_concept_and_no_other_text_does(concept):
    found = worded(concept).concept
    names = (found.name, *found.aliases)
    assert len(found.pairs) >= 90
    assert all(mentions(prompt, names) for prompt in found.prompts)
    assert not any(mentions(without, names) for _, without in found.pairs)
    assert not any(mentions(anchor, names) for anchors in found.anchors for anchor in anchors)


def test_held_out_prompts_have_templates_and_words_of_their_own():
    found = worded(Concept.style("Van Gogh")).concept
    made = set(made_for(len(found.pairs)))
    withouts = [without for _, without in found.pairs]
    solved = {withouts[index] for index in made}
    assert len(made) == pytest.approx(0.8 * len(withouts), abs=1)
    assert not solved & {text for index, text in enumerate(withouts) if index not in made and text}


def test_few_pairs_become_twenty_beside_other_prompts():
    """The concept and its anchors stand beside the same; what the bank keeps is as given."""
    concept = Concept.from_template("neon", ["a {concept} cat", "{concept}"], ["a cat", ""], anchor="grey")
    more = in_company(concept, ["bus", "tree", "sun"])
    assert more.pairs[:2] == concept.pairs
    assert len(more.pairs) == len(set(more.pairs)) <= 20
    assert ("a neon cat, bus", "a cat, bus") in more.pairs
    assert ("neon, bus", "bus") in more.pairs or ("neon, tree", "tree") in more.pairs
    assert any(prompt.endswith(", neon") for prompt in more.prompts)
    for (prompt, _), anchors in zip(more.pairs, more.anchors, strict=True):
        assert anchors == (prompt.replace("neon", "grey"),)
    assert in_company(more, ["bus"]) is more
    assert in_company(concept, []) is concept


def test_aliases_take_half_of_the_prompts():
    found = worded(Concept.style("Van Gogh", aliases=["VG"])).concept
    own = [prompt for prompt in found.prompts if mentions(prompt, ["Van Gogh"])]
    assert 0.4 < len(own) / len(found.prompts) < 0.9
    assert any(mentions(prompt, ["VG"]) for prompt in found.prompts)


def test_a_style_becomes_the_prompt_without_it():
    found = worded(Concept.style("Van Gogh"))
    assert found.anchor is None
    assert found.concept.anchors == tuple((without,) for _, without in found.concept.pairs)


def test_an_object_becomes_the_nearest_other(pocket_pipe):
    """In the same wording; never another concept that is erased."""
    concept, kind = Concept.object("pig"), find_kind("object", pocket_pipe)
    encoded = Encoded(pocket_pipe)
    first = word_concept(concept, kind, pocket_pipe.tokenizer, encoded)
    assert all(mentions(anchors[0], [first.anchor]) for anchors in first.concept.anchors)
    second = word_concept(concept, kind, pocket_pipe.tokenizer, encoded, avoid=[first.anchor])
    assert second.anchor not in (first.anchor, "pig")
    own, near, far = encoded(["a pig", f"a {first.anchor}", f"a {second.anchor}"]).flatten(1)
    assert (own - near).norm() <= (own - far).norm()


def test_templates_that_the_text_encoder_spells_letter_by_letter_are_left_out(pocket_pipe):
    """The built-in tokenizer does not know "painting"; it is told, and what is left is used."""
    found = worded(Concept.style("neon"), pocket_pipe.tokenizer)
    assert any("letter by letter" in reason for reason in found.left_out.values())
    assert not any("painting" in prompt for prompt in found.concept.prompts)
    longest = max(len(pocket_pipe.tokenizer(prompt).input_ids) for prompt in found.concept.prompts)
    assert longest <= pocket_pipe.tokenizer.model_max_length


def test_the_parts_of_a_compound_are_words(pocket_pipe):
    """The tokenizer makes more pieces of the whole than a word may have, and one of each part."""
    tokenizer = pocket_pipe.tokenizer
    kind = find_kind("style").model_copy(
        update={"words": {"subject": ("cat-and-dog", "dog", "fox"), "other": ("pencil",)}}
    )
    assert len(tokenizer.tokenize("cat-and-dog")) > 3
    found = word_concept(Concept.style("neon"), kind, tokenizer).concept
    assert any("cat-and-dog" in prompt for prompt in found.prompts)


def test_too_few_templates_are_refused(tmp_path):
    words = {chr(letter): letter - 96 for letter in range(97, 123)}
    vocabulary = {"<|startoftext|>": 0, **words, **{f"{c}</w>": n + 26 for c, n in words.items()}, "<|endoftext|>": 53}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=6)
    with pytest.raises(ValueError, match=r"reads \d for 'Van Gogh', and 4 are the fewest; left out"):
        worded(Concept.style("Van Gogh"), tokenizer)


def test_words_that_name_the_concept_are_not_used():
    assert not any("window" in without.split() for _, without in worded(Concept.object("window")).concept.pairs)


def test_only_unambiguous_words_of_a_content_are_spelled():
    found = worded(Concept.content("nudity", aliases=["my word"])).concept
    assert {"nudity", "my word"} <= set(found.spellings)
    assert "naked" in found.aliases
    assert "naked" not in found.spellings


@pytest.mark.parametrize("name", ["nudity", "violence"])
def test_every_known_word_of_a_content_is_in_a_prompt(name):
    found = worded(Concept.content(name)).concept
    assert len(found.aliases) > 20
    assert not [alias for alias in found.aliases if not any(mentions(prompt, [alias]) for prompt in found.prompts)]


def test_the_same_prompts_every_time():
    assert worded(Concept.object("gun")) == worded(Concept.object("gun"))
