from dataclasses import replace

import pytest
import torch

from sepme_diffusers.bank.fingerprint import Fingerprint

BASE = Fingerprint(8, {"pooled": 12}, 4, {"to_k": (4, 2.5), "to_v": (6, 3.0)})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"width": 9}, "embeddings are 8 wide, not 9"),
        ({"doors": {"pooled": 13}}, "further doors have other widths: pooled"),
        ({"n_tokens": 5}, "prompts have 4 tokens, not 5"),
        ({"projections": {"to_k": (4, 2.5)}}, "only one has the text projections to_v"),
        ({"projections": {"to_k": (4, 2.5), "to_v": (5, 3.0)}}, "other heights: to_v"),
        ({"projections": {"to_k": (4, 2.6), "to_v": (6, 3.0)}}, "other weights: to_k"),
    ],
)
def test_the_reason_is_named(changes, reason):
    other = replace(BASE, **changes)
    assert reason in BASE.differs(other)
    assert other.differs(BASE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"doors": {}},
        {"doors": {"other": 3}},
        {"n_tokens": None},
        {"projections": None},
        {"projections": {"to_k": (4, 2.51), "to_v": (6, 3.0)}},  # as a cast changes it
    ],
)
def test_what_was_not_looked_at_is_no_difference(changes):
    other = replace(BASE, **changes)
    assert (BASE.differs(other), other.differs(BASE)) == ("", "")


def test_weights_have_one():
    weights = {"to_k": torch.full((4, 8), 0.5), "to_v": torch.zeros(6, 8)}
    assert Fingerprint.of_weights(weights).projections == {"to_k": (4, pytest.approx(8**0.5)), "to_v": (6, 0.0)}
    assert Fingerprint.of_weights(weights).width == 8
    assert not BASE.text_side.differs(Fingerprint.of_weights(weights))
