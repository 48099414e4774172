"""Rows of prompts matched by words."""

import pytest

from sepme_diffusers.text.alignment import aligned_rows

N = 16


@pytest.fixture
def rows(pocket_pipe):
    """The rows of the anchor for the rows of a prompt, up to the end token of the prompt."""

    def matched(prompt, anchor):
        length = len(pocket_pipe.tokenizer(prompt).input_ids)
        found = aligned_rows(pocket_pipe.tokenizer, prompt, anchor, N)
        assert len(found) == N
        return found[:length]

    return matched


def test_words_are_matched_wherever_they_stand(rows):
    assert rows("neon cat", "cat") == [0, None, 1, 2]
    assert rows("a neon picture of a cat", "a picture of a cat") == [0, 1, None, 2, 3, 4, 5, 6]


def test_words_that_the_anchor_lacks_have_no_row(rows):
    assert rows("a cat in the style of neon", "a cat") == [0, 1, 2, None, None, None, None, None, 3]


def test_a_word_in_the_place_of_another_is_its_row(rows):
    assert rows("a cat", "a dog") == [0, 1, 2, 3]


def test_everything_is_dropped_against_the_blank_prompt_but_start_and_end(rows):
    assert rows("a cat", "") == [0, None, None, 1]


def test_the_same_prompt_is_matched_with_itself(pocket_pipe):
    assert aligned_rows(pocket_pipe.tokenizer, "a cat and a dog", "a cat and a dog", N) == list(range(N))


def test_padding_is_matched_by_position(pocket_pipe):
    found = aligned_rows(pocket_pipe.tokenizer, "neon cat", "cat", N)
    assert found[4:] == list(range(4, N))


def test_a_longer_anchor_keeps_its_words_to_itself(pocket_pipe):
    """No row of padding is mapped to a word of the anchor."""
    found = aligned_rows(pocket_pipe.tokenizer, "cat", "a cat and a dog", N)
    assert min(found[2:]) >= 6


def test_without_a_tokenizer_rows_are_matched_by_position():
    assert aligned_rows(None, "a cat", "dog", N) == list(range(N))


def test_a_prompt_that_is_cut_has_as_many_rows(pocket_pipe):
    long = "a cat and a dog " * 10
    assert len(aligned_rows(pocket_pipe.tokenizer, long, "a cat", N)) == N
