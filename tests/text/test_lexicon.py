import hashlib
import json
import re
from itertools import permutations

import pytest

from sepme_diffusers.text.lexicon import Lexicon, split

EVERYDAY = Lexicon.everyday()
PROMPTS = EVERYDAY.prompts(3750)
SLOT = re.compile(r"\{([a-z]+)\d*\}")
SMALL = {"captions": ["a {animal} {place}", "{animal}"], "words": {"animal": ["owl", "cat"], "place": ["at home"]}}
FIRST_300 = "86da96792e1e1f8e3ca59e31d7c572869f1dcdda593a37b071ccab83eb960347"


def words_in(text):
    return len(text.replace(",", "").split())


def drawn(n):
    """How often each caption and each word of each slot is drawn for n prompts of a lexicon whose words show it."""
    words = {slot: tuple(f"<{slot} {i}>" for i in range(len(texts))) for slot, texts in EVERYDAY.words.items()}
    captions = tuple(f"<caption {i}> {caption}" for i, caption in enumerate(EVERYDAY.captions))
    made = " ".join(Lexicon(captions, words).prompts(n))
    counts = {slot: [made.count(word) for word in texts] for slot, texts in words.items()}
    return counts | {"caption": [made.count(f"<caption {i}>") for i in range(len(captions))]}


def bad(**changes):
    return json.dumps(SMALL | changes)


def test_as_many_prompts_as_asked_for_and_no_two_alike():
    assert len(PROMPTS) == len({prompt.casefold() for prompt in PROMPTS}) == 3750
    assert EVERYDAY.prompts(0) == ()


@pytest.mark.parametrize("fewer", [1, 65, 300, 3749])
def test_fewer_prompts_are_the_first_of_more(fewer):
    assert EVERYDAY.prompts(fewer) == PROMPTS[:fewer]


def test_the_prompts_are_the_same_everywhere():
    assert hashlib.sha256("\n".join(PROMPTS[:300]).encode()).hexdigest() == FIRST_300


def test_another_seed_makes_other_prompts():
    assert len(set(EVERYDAY.prompts(300, seed=1)) & set(PROMPTS[:300])) < 20


def test_captions_and_words_are_used_evenly():
    for slot, counts in drawn(6000).items():
        assert 0 < max(counts) <= 2 * min(counts), slot
    assert max(drawn(3750)["caption"]) - min(drawn(3750)["caption"]) <= 1


def test_every_slot_is_used():
    assert {slot for caption in EVERYDAY.captions for slot in SLOT.findall(caption)} == set(EVERYDAY.words)


def test_no_prompt_is_longer_than_a_text_encoder_reads():
    """Twenty words are fewer than 77 tokens, whichever words meet."""
    longest = {slot: max(texts, key=words_in) for slot, texts in EVERYDAY.words.items()}
    for caption in EVERYDAY.captions:
        assert words_in(SLOT.sub(lambda slot: longest[slot[1]], caption)) <= 20, caption
    assert max(map(words_in, PROMPTS)) <= 20


def test_words_are_plain():
    for texts in (EVERYDAY.captions, *EVERYDAY.words.values()):
        assert all(text.isascii() and text.isprintable() and text == text.strip() for text in texts)
        assert len({text.casefold() for text in texts}) == len(texts)


def test_articles_are_right():
    said = {article.lower(): set() for article in ("a", "an")}
    for article, word in re.findall(r"\b(an?) (\w+)", " ".join(EVERYDAY.prompts(6000)), re.IGNORECASE):
        said[article.lower()].add(word.lower())
    assert {word for word in said["a"] if word[0] in "aeiou"} <= {"unicorn", "unicycle", "university", "ukulele"}
    assert {word for word in said["an"] if word[0] not in "aeiou"} == {"hourglass"}
    assert {"owl", "umbrella", "upside"} <= said["an"]


@pytest.mark.parametrize(
    ("word", "article"),
    [
        ("owl", "an"), ("Owl", "an"), ("uninvited guest", "an"), ("hour", "an"), ("honest man", "an"), ("onion", "an"),
        ("one-eyed cat", "a"), ("unicorn", "a"), ("European city", "a"), ("used car", "a"), ("house", "a"),
    ],
)  # fmt: skip
def test_an_article_follows_the_sound(word, article):
    lexicon = Lexicon(("a {thing}", "On a {thing}: via {thing}", "A {thing}."), {"thing": (word,)})
    expected = {f"{article} {word}", f"On {article} {word}: via {word}", f"{article.capitalize()} {word}."}
    assert set(lexicon.prompts(3)) == expected


def test_a_numbered_slot_takes_another_word():
    lexicon = Lexicon(("{x} {x2} {x3} {x}",), {"x": ("r", "s", "t")})
    assert set(lexicon.prompts(6)) == {f"{a} {b} {c} {a}" for a, b, c in permutations("rst")}


def test_more_prompts_than_there_are_words_for_are_refused():
    small = Lexicon(**SMALL)
    assert set(small.prompts(4)) == {"an owl at home", "a cat at home", "owl", "cat"}
    with pytest.raises(ValueError, match="makes about 4 prompts, not 5"):
        small.prompts(5)
    with pytest.raises(ValueError, match="0 or more, not -1"):
        small.prompts(-1)


def test_the_words_of_a_slot():
    assert "Vincent van Gogh" in EVERYDAY.names("style")
    with pytest.raises(ValueError, match=r"no slot 'colour'; there are \['action', 'adjective'"):
        EVERYDAY.names("colour")


def test_every_fifth_prompt_is_held_out():
    solving, held_out = split(PROMPTS)
    assert (len(solving), len(held_out)) == (3000, 750)
    assert held_out == PROMPTS[4::5]
    assert set(solving) | set(held_out) == set(PROMPTS)
    assert split([]) == split(()) == ((), ())


@pytest.mark.parametrize("fewer", range(8))
def test_a_prompt_is_on_the_same_side_however_many_follow(fewer):
    for some, all_of_them in zip(split(PROMPTS[:fewer]), split(PROMPTS), strict=True):
        assert some == all_of_them[: len(some)]


def test_both_sides_have_prompts_of_every_caption():
    """A fixed order of captions, whose number five divides, would hold out the same ones each time."""
    numbered = tuple(f"<{i}> {caption}" for i, caption in enumerate(EVERYDAY.captions))
    for side in split(Lexicon(numbered, EVERYDAY.words).prompts(3750)):
        assert len({prompt.split()[0] for prompt in side}) == len(numbered)


def test_one_string_is_not_a_list_of_prompts():
    with pytest.raises(TypeError, match=r"\['a cat'\]"):
        split("a cat")


def test_a_file_makes_a_lexicon(tmp_path):
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    lexicon = Lexicon.from_file(tmp_path / "small.json")
    assert lexicon == Lexicon(("a {animal} {place}", "{animal}"), {"animal": ("owl", "cat"), "place": ("at home",)})
    assert Lexicon.everyday() is EVERYDAY


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Lexicon.from_file(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("\xff", "'utf-8' codec"),
        ("[1, 2]", r"an object with the keys 'captions' and 'words', not \[1, 2\]"),
        ('{"captions": ["a"]}', r"the keys 'captions' and 'words', not \['captions'\]"),
        (bad(seed=1), r"not \['captions', 'seed', 'words'\]"),
        ('{"captions": ["a"], "words": {"x": ["b"], "x": ["c"]}}', r"keys given twice: \['x'\]"),
        (bad(captions="a {animal}"), "captions must be a list of strings, not 'a {animal}'"),
        (bad(captions=[]), "captions is empty; give at least one"),
        (bad(captions=["a {plant}"]), r"'a {plant}' has the unknown slot 'plant'; there are \['animal', 'place'\]"),
        (bad(captions=["a {animal"]), "'a {animal' has a brace that is part of no slot"),
        (bad(captions=["a {Animal}"]), "'a {Animal}' has a brace that is part of no slot"),
        (bad(captions=["{place} and {place2}"]), "needs 2 words of 'place'; there are 1"),
        (bad(words=["owl"]), r"words must map each slot to a list of strings, not be \['owl'\]"),
        (bad(words={"animal": "owl"}), r"words\['animal'\] must be a list of strings, not 'owl'"),
        (bad(words={"animal": ["owl", 7]}), r"words\['animal'\] must be a list of strings, not \['owl', 7\]"),
        (bad(words={"animal": []}), r"words\['animal'\] is empty"),
        (bad(words={"animal": ["owl", ""]}), r"words\['animal'\] must be printable .* unlike \[''\]"),
        (bad(words={"animal": ["owl", " cat"]}), r"words\['animal'\] must be printable .* unlike \[' cat'\]"),
        (bad(words={"animal": ["owl", "Owl"]}), r"words\['animal'\] must differ .* twice: \['owl'\]"),
        (bad(words={"animal2": ["owl"]}), r"only the letters a to z, unlike \['animal2'\]"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, text, message):
    file = tmp_path / "bad.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=rf"bad\.json: .*{message}"):
        Lexicon.from_file(file)
