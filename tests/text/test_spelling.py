import itertools
import random

from sepme_diffusers.text.spelling import look_alikes

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
