"""Erasing what a user names, read by CLIP's own tokenizer: its vocabulary of 49,408 tokens, 77 to a prompt."""

import ast
import re
import unicodedata
from itertools import chain, permutations

import pytest

from clip_vocabulary import SIZE, clip_pipeline, clip_tokenizer, with_denoiser
from sepme_diffusers import Concept, SepMETrainer
from sepme_diffusers.making.kinds import find_kind, kind_names
from sepme_diffusers.making.kinds.wording import _Reader, word_concept
from sepme_diffusers.text.encoding import encode
from sepme_diffusers.text.spelling import mentions, spells

GOGH, DYCK = "Van Gogh", "Van Dyck"
CONTENTS = ("nudity", "violence")
TOO_LONG = "富嶽三十六景の北斎" * 5


@pytest.fixture(scope="module")
def tokenizer():
    return clip_tokenizer()


@pytest.fixture(scope="module")
def clip():
    """A text encoder that reads the words for a content alike."""
    return clip_pipeline([find_kind("content").names_of(name) for name in CONTENTS])


@pytest.fixture(scope="module")
def trainer(clip):
    return SepMETrainer(clip, regular=300)


@pytest.fixture(scope="module")
def styles(trainer):
    return trainer.erase([GOGH, DYCK], kind="style")


@pytest.fixture(scope="module")
def others(trainer):
    """Two contents; and, on their own, a person."""
    contents = trainer.erase(CONTENTS, kind="content")
    person = trainer.erase(["Albert Einstein"], kind="person")
    return {**dict.fromkeys(CONTENTS, contents), "Albert Einstein": person}


@pytest.fixture(scope="module")
def explained(clip):
    """Tells for a prompt what a concept of a bank reads."""
    pipe = with_denoiser(clip)

    def explain(bank, name, prompt):
        pipe.load_sepme(bank)
        try:
            return pipe.explain(prompt, [name]).prompts[0][name]
        finally:
            pipe.unload_sepme()

    return explain


def test_it_is_clips_tokenizer(tokenizer):
    assert len(tokenizer) == SIZE
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = tokenizer("a cat", padding="max_length").input_ids
    assert padded == [49406, 320, 2368] + [49407] * 74


@pytest.mark.parametrize("name", kind_names())
def test_every_template_and_word_of_a_kind_is_read(tokenizer, name):
    """Also with the longest of the names that the kind knows."""
    kind = find_kind(name)
    longest = max(kind.known, key=lambda known: max(len(tokenizer(each).input_ids) for each in kind.names_of(known)))
    worded = word_concept(Concept(longest, kind=name), kind, tokenizer)
    assert (worded.left_out, worded.cut) == ({}, ())
    assert len(worded.concept.pairs) >= 100
    assert max(len(tokenizer(prompt).input_ids) for prompt in worded.concept.prompts) < 77
    texts = [*(template.prompt for template in kind.templates), *chain(*kind.words.values())]
    assert [text for text in texts if not _Reader(tokenizer).reads(text)] == []


def test_no_name_is_that_of_two_concepts(tokenizer):
    """Within a kind, also to the text encoder; but for rifles, which are guns as well as a concept of their own."""
    for kind in map(find_kind, kind_names()):
        owners = {}
        for known in kind.known:
            for name in kind.names_of(known):
                owners.setdefault(tuple(tokenizer(name).input_ids), set()).add(known)
        assert [found for found in owners.values() if len(found) > 1] == ([{"gun", "rifle"}] * (kind.kind == "object"))


def test_names_that_have_another_concept_in_them():
    """They open the gates of both by being spelled. Most are both; a tiger shark and Michelangelo Merisi are not."""
    found = set()
    for kind in map(find_kind, kind_names()):
        names = {known: kind.names_of(known) for known in kind.known}
        for known, other in permutations(kind.known, 2):
            spellings = kind.about_name(known).spelled or names[known]
            if spells("; ".join(names[other]), spellings):
                found |= {(known, name) for name in names[other] if spells(name, spellings)}
    both = {"gun", "rifle", "truck", "bicycle", "dog", "bear"}
    assert {known for known, _ in found} == {*both, "tiger", "Michelangelo"}
    assert {name for known, name in found if known == "tiger"} == {"tiger shark"}


def test_names_that_share_a_token_are_told_apart(clip, styles, explained):
    """Each has a gate, which is shut for the other's prompts and for the word that both have."""
    prompts = {
        name: [f"a bridge in the style of {name}", f"{name}, a house", f"a cat painted by {name}"]
        for name in (GOGH, DYCK)
    }
    for name, other in ((GOGH, DYCK), (DYCK, GOGH)):
        increment, said = styles[name].increment, styles[name].metrics
        assert said["own_reached"] >= 0.6
        assert said["regular_moved"] == 0
        read = increment.reading(encode(clip, prompts[name]))
        assert float(read.min()) > increment.gate
        passed = increment.reading(encode(clip, [*prompts[other], "a van on the road", "a delivery van"]))
        assert float(passed.max()) < increment.gate
    for prompt in (prompts[DYCK][0], "a van on the road"):
        reading = explained(styles, GOGH, prompt)
        assert (reading.acts, reading.spelled) == (False, ())


def test_the_other_name_is_guarded_exactly(clip, styles):
    assert all(styles.guarantees[name].exact for name in ("", GOGH, DYCK))
    for name, other in ((GOGH, DYCK), (DYCK, GOGH)):
        assert other in styles[name].exact_guards
        nothing = float(styles[name].increment.reading(encode(clip, [other])))
        assert nothing < 1e-4 * styles[name].increment.gate


@pytest.mark.parametrize("prompt", ["a fox, vincent van gogh", "VAN GOGH fox", "van-gogh fox", "Van Gough's fox"])
def test_a_name_of_several_tokens_is_spelled_in_many_ways(styles, explained, prompt):
    assert explained(styles, GOGH, prompt).acts
    assert not explained(styles, DYCK, prompt).acts


@pytest.mark.parametrize("name", ["H. R. Giger", "Édouard Manet", "葛飾北斎", "🎨", "Zdzisław Beksiński"])
def test_names_in_any_script_are_worded_and_spelled(tokenizer, name):
    """However many pieces the tokenizer cuts them into, in either way to write accents."""
    for written in {unicodedata.normalize(form, name) for form in ("NFC", "NFD")}:
        worded = word_concept(Concept.style(written), find_kind("style"), tokenizer)
        assert len(worded.concept.pairs) >= 100
        assert tokenizer(written).input_ids == tokenizer(name).input_ids
        for form in ("NFC", "NFD"):
            assert spells(unicodedata.normalize(form, f"a fox in the style of {name}, 4k"), [written])
    assert not spells("a fox in the style of Manetti", [name])


@pytest.fixture(scope="module")
def hokusai(trainer):
    """Eleven tokens, and an alias of more than there is room for."""
    return trainer.erase([Concept.style("葛飾北斎", aliases=[TOO_LONG])])


def test_a_name_of_eleven_tokens_is_erased(hokusai, explained):
    assert hokusai["葛飾北斎"].metrics["own_reached"] >= 0.6
    assert explained(hokusai, "葛飾北斎", "葛飾北斎の波").spelled == ("葛飾北斎",)
    assert explained(hokusai, "葛飾北斎", "a great wave, 葛飾北斎").acts
    assert not explained(hokusai, "葛飾北斎", "a great wave").acts


def test_an_alias_that_the_text_encoder_cuts_is_in_no_prompt_and_that_is_said(hokusai, tokenizer):
    assert len(tokenizer(TOO_LONG).input_ids) > 77
    entry = hokusai["葛飾北斎"]
    assert entry.metrics["aliases_cut"] == [TOO_LONG]
    (doubt,) = entry.doubts
    assert "has names that are longer than the text encoder reads" in doubt
    assert "give shorter aliases" in doubt
    assert TOO_LONG in entry.spellings
    prompts = word_concept(entry.concept, find_kind("style"), tokenizer).concept.prompts
    assert len(prompts) == 100
    assert not any(TOO_LONG in prompt for prompt in prompts)


def test_a_second_name_that_is_another_concepts_in_other_letters_is_left_out(tokenizer):
    """Accents, points and spaces tell no concepts apart; some of these names are the same to the text encoder, too."""
    decomposed = unicodedata.normalize("NFD", "Édouard Manet")
    assert tokenizer(decomposed).input_ids == tokenizer("Édouard Manet").input_ids
    manet = word_concept(Concept.style("Manet"), find_kind("style"), tokenizer, avoid=[decomposed])
    assert not {"Édouard Manet", "Edouard Manet"} & set(manet.concept.aliases)
    assert "Eduard Manet" in manet.concept.aliases
    assert tokenizer("H.R. Giger").input_ids == tokenizer("H. R. Giger").input_ids
    giger = word_concept(Concept.style("Giger"), find_kind("style"), tokenizer, avoid=["H. R. Giger"])
    assert not {"H. R. Giger", "H.R. Giger", "HR Giger"} & set(giger.concept.aliases)
    assert "Hans Ruedi Giger" in giger.concept.aliases


@pytest.mark.parametrize(
    ("name", "literal", "paraphrase"),
    [
        ("nudity", "a photo of a nude man", "a photo of a woman before her bath, her robe on the floor"),
        ("violence", "a painting of a murdered man", "a painting of two men who hurt each other"),
        ("Albert Einstein", "a portrait of Albert Einstein", "a portrait of the physicist who found relativity"),
    ],
)
def test_literal_names_are_told_apart_and_paraphrases_read_less(others, explained, name, literal, paraphrase):
    bank, entry = others[name], others[name][name]
    assert entry.increment.gate is not None
    assert entry.metrics["own_reached"] >= 0.75
    assert entry.metrics["regular_moved"] == 0
    assert entry.doubts == ()
    assert explained(bank, name, literal).acts
    reading = explained(bank, name, paraphrase)
    assert (reading.acts, reading.spelled) == (False, ())
    assert reading.doors[0].reading < entry.increment.gate


@pytest.mark.parametrize("name", CONTENTS)
def test_words_that_mean_nothing_else_open_a_content_by_being_spelled(others, name):
    concept, known = others[name][name].concept, find_kind("content").about_name(name)
    assert set(known.spelled) <= {*concept.spellings, name}
    for alias in known.spelled:
        assert spells(f"a picture, {alias}, of a couple", concept.spellings)
    assert len(set(known.names) - set(concept.spellings)) >= 20


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("nudity", "stars seen by the naked eye"), ("nudity", "a nude lipstick"), ("violence", "a dead tree")],
)
def test_a_word_that_means_something_else_is_not_spelled(others, explained, name, prompt):
    assert explained(others[name], name, prompt).spelled == ()


def test_words_that_are_not_read_alike_have_no_gate_and_the_warning_says_which(caplog):
    """Each of seventy words is something else to this text encoder: no direction reads all of them."""
    entry = SepMETrainer(clip_pipeline(), regular=100).erase(["nudity"], kind="content")["nudity"]
    assert entry.increment.gate is None
    (warning,) = [record.getMessage() for record in caplog.records if "no gate for 'nudity'" in record.getMessage()]
    named = re.search(r"do not spell it, such as (\[.*?\])", warning)[1]
    prompts = ast.literal_eval(named)
    assert len(prompts) == 3
    assert all(mentions(prompt, entry.concept.aliases) for prompt in prompts)
    assert not any(spells(prompt, entry.spellings) for prompt in prompts)
    assert "Give it aliases that mean nothing else, describe it with pairs of prompts of your own, or take" in warning
    assert any("moves 100.0% of the regular prompts" in doubt for doubt in entry.doubts)
