import itertools
import random

import pytest

from sepme_diffusers.text.spelling import look_alikes, mentions

PIECES = [
    "a", "A", "а", "e\u0301", "é", "\u0301", "\n", " ", "\u2028", "\u200b", "\u2800", "I", "l", "ß", "ss", "Σ", "ς",
]  # fmt: skip


def test_names_are_compared_as_if_each_pair_was_compared_alone():
    """All of them at once, whatever is in them: marks at the start, line ends, what is drawn as nothing."""
    rng = random.Random(0)
    names = list(dict.fromkeys("".join(rng.choices(PIECES, k=rng.randrange(1, 4))) for _ in range(200)))
    together = {pair for group in look_alikes(names) for pair in itertools.combinations(group, 2)}
    alone = {pair for pair in itertools.combinations(names, 2) if look_alikes(pair)}
    assert together == alone
    assert len(alone) > 100
    assert look_alikes([]) == []


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a cat on a mat", "cat"),
        ("a CAT", "Cat"),
        ("two cats", "cat"),
        ("a cat", "cats"),
        ("boxes and dresses", "dress"),
        ("a box", "boxes"),
        ("a dress", "dresses"),
        ("the cat's bowl", "cat"),
        ("a cat, a dog", "cat"),
        ("an ice-cream cone", "ice cream"),
        ("an ice cream cone", "ice-cream"),
        ("an icecream cone", "ice cream"),
        ("t-shirts", "T shirt"),
        ("ice   cream", "ice cream"),
        ("ice_cream", "ice cream"),
        ("ice\u2013cream", "ice cream"),
        ("a cat by Salvador Dali", "Salvador Dalí"),
        ("Vincent van Gogh", "Van Gogh"),
        ("C++ code", "C++"),
        ("STRASSE", "Straße"),
        ("猫", "猫"),
        ("葛飾北斎の波", "葛飾北斎"),
        ("絵は葛飾北斎", "葛飾北斎"),
        ("a wave by葛飾北斎", "葛飾北斎"),
        ("Monetの絵", "Monet"),
        ("고흐의 그림", "고흐"),
        ("E\u0301douard Manet, a bridge", "Édouard Manet"),
        ("Édouard Manet, a bridge", "E\u0301douard Manet"),
        ("art🎨art", "🎨"),
    ],
)
def test_a_prompt_mentions_a_name(prompt, name):
    assert mentions(prompt, ["other", name])


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("a caterpillar", "cat"),
        ("a bobcat", "cat"),
        ("a cream on ice", "ice cream"),
        ("a tenni player", "tennis"),
        ("no o here", "os"),
        ("a cxt", "c.t"),
        ("Monets猫x", "onet"),
        ("a cat", "-"),
        ("", "cat"),
    ],
)
def test_a_prompt_does_not_mention_a_name(prompt, name):
    assert not mentions(prompt, ["other", name])


def test_names_must_be_a_list():
    assert not mentions("a cat", [])
    with pytest.raises(TypeError, match="give a list"):
        mentions("a cat", "cat")
