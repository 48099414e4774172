"""Kinds: their files, and what they know of names."""

import json

import pytest

from sepme_diffusers.making.kinds import Kind, find_kind, kind_names

GOOD = {
    "kind": "comic",
    "version": 1,
    "about": "A comic's look.",
    "becomes": "without",
    "neighbours": None,
    "templates": [{"prompt": "a {subject}, {name}", "without": "a {subject}"}],
    "words": {"subject": ["cat", "dog"]},
}


def written(folder, **changes):
    path = folder / "comic.json"
    path.write_text(json.dumps(GOOD | changes))
    return path


def test_the_packages_kinds_can_be_read():
    assert kind_names() == ("content", "object", "person", "style")
    for name in kind_names():
        kind = find_kind(name)
        assert kind.kind == name
        assert len(kind.templates) >= 24


@pytest.mark.parametrize("name", ["content", "object", "person", "style"])
def test_no_kind_brings_a_number_of_the_method(name):
    """A kind says in which prompts a concept shows; what is solved with which weight is for the text to say."""
    fields = {"kind", "version", "about", "becomes", "neighbours", "templates", "words", "aliases", "known"}
    assert set(Kind.model_fields) == fields
    numbers = [value for value in find_kind(name).model_dump().values() if isinstance(value, float)]
    assert numbers == []


def test_a_file_of_ones_own(tmp_path):
    assert find_kind(str(written(tmp_path))).kind == "comic"


def test_an_unknown_kind_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"no kind 'stlye'; there are \['content', 'object', 'person', 'style'\]"):
        find_kind("stlye")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"templates": [{"prompt": "a {subject}", "without": ""}]}, r"templates.0.*needs the slot \{name\} once"),
        ({"templates": [{"prompt": "{name}", "without": "{subject}"}]}, "templates.0.*do not belong there"),
        ({"templates": [{"prompt": "{name} {place}", "without": ""}]}, r"none for the slots \['place'\]"),
        ({"words": {"subject": ["cat", "Cat"]}}, r"words\['subject'\]: given twice: \['cat'\]"),
        ({"words": {"subject": ["cat", ""]}}, "words.subject.1"),
        ({"words": {"subject": "cat"}}, "words.subject"),
        ({"becomes": "nothing"}, "becomes"),
        ({"becomes": "other"}, "needs words for the slot 'other'"),
        ({"weight": 300.0}, "weight"),
        ({"aliases": ["{subject}s"]}, r"patterns need \{name\}"),
        ({"known": {"Tintin": ["tintin"]}}, r"known\['Tintin'\]: given twice"),
    ],
)
def test_a_faulty_file_is_refused_with_its_name_and_the_key(tmp_path, changes, said):
    with pytest.raises(ValueError, match=rf"(?s)comic.json is no kind of concepts: .*{said}"):
        Kind.from_file(written(tmp_path, **changes))


def test_a_file_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json is no kind of concepts"):
        Kind.from_file(tmp_path / "x.json")


def test_names_of_a_concept():
    style = find_kind("style")
    assert style.names_of("Van Gogh")[:2] == ("Van Gogh", "Vincent van Gogh")
    assert "Van Gogh" in style.names_of("vincent van gogh")
    assert style.names_of("Nobody Known", ["NK"])[:2] == ("Nobody Known", "NK")


def test_a_concept_of_its_own_is_not_taken_for_what_has_it_as_a_second_name():
    object_kind = find_kind("object")
    assert "rifle" in object_kind.names_of("gun")
    assert "assault rifle" in object_kind.names_of("rifle")
    assert not {"gun", "pistol"} & set(object_kind.names_of("rifle"))


def test_ambiguous_words_of_a_content_do_not_block_by_spelling():
    known = find_kind("content").about_name("nudity")
    assert "naked" in known.names
    assert "naked" not in known.spelled
