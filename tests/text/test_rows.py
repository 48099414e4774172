import pytest
from transformers import CLIPTokenizer

from sepme_diffusers import pocket
from sepme_diffusers.text.rows import words_of_rows

ROWS = 9


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(pocket.path(), subfolder="tokenizer")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", []),
        ("a  Neon cat", ["a", "Neon", "cat"]),
        ("a cat, neon", ["a", "cat", ",", "neon"]),
        ("a neonatal", ["a", *["neonat"] * 6]),  # what the embedding has no room for is not read
    ],
)
def test_rows_stand_for_the_words_as_they_are_written(tokenizer, prompt, words):
    padding = [None] * (ROWS - 1 - len(words))
    assert words_of_rows(tokenizer, prompt, ROWS) == [None, *words, *padding]


def test_without_a_tokenizer_no_word_is_known():
    assert words_of_rows(None, "a cat", 3) == [None, None, None]
