"""Words in the slots of captions."""

import pytest

from sepme_diffusers.text.captions import filled


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("owl", "an owl"),
        ("unicorn", "a unicorn"),
        ("hourglass", "an hourglass"),
        ("X-rated film", "an X-rated film"),
        ("NSFW picture", "an NSFW picture"),
        ("H. R. Giger print", "an H. R. Giger print"),
        ("HR Giger print", "an HR Giger print"),
        ("J. M. W. Turner print", "a J. M. W. Turner print"),
        ("LEGO brick", "a LEGO brick"),
        ("T-shirt", "a T-shirt"),
        ("half-open door", "a half-open door"),
    ],
)
def test_the_article_is_the_one_that_is_said(word, said):
    assert filled("a {subject}", {"subject": word}) == said
