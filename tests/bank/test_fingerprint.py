from dataclasses import replace

import pytest
import torch

from sepme_diffusers.bank.fingerprint import PROBES, Encoding, Fingerprint, sketch, vocabularies
from small import TOKENS, WIDTH, random_pipeline

SKETCH = ((1.0, 0.0), (0.0, 1.0))
TEXT = Encoding(8, 4, layer="penultimate", template="", max_length=4, blank="zeros", sketch=SKETCH)
BASE = Fingerprint(
    {"tokens": TEXT, "pooled": Encoding(12)}, {"tokenizer": "0" * 64}, {"to_k": (4, 2.5), "to_v": (6, 3.0)}
)


def with_tokens(**changes):
    return {"doors": {**BASE.doors, "tokens": replace(TEXT, **changes)}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (with_tokens(width=9), "embeddings are 8 wide, not 9"),
        (with_tokens(n_tokens=5), "prompts have 4 tokens, not 5"),
        (with_tokens(layer="last"), "layer is 'penultimate', not 'last'"),
        (with_tokens(template="a photo of {}"), "template is '', not 'a photo of {}'"),
        (with_tokens(max_length=77), "max_length is 4, not 77"),
        (with_tokens(blank="encoded"), "blank is 'zeros', not 'encoded'"),
        (with_tokens(sketch=((1.0, 0.0), (0.2, 1.0))), "prompts are embedded in another way"),
        ({"doors": {"tokens": TEXT, "pooled": Encoding(13)}}, "at the door 'pooled' embeddings are 12 wide, not 13"),
        ({"vocabularies": {"tokenizer": "1" * 64}}, "the vocabulary of tokenizer is another one"),
        ({"projections": {"to_k": (4, 2.5)}}, "only one has the text projections to_v"),
        ({"projections": {"to_k": (4, 2.5), "to_v": (5, 3.0)}}, "other heights: to_v"),
        ({"projections": {"to_k": (4, 2.6), "to_v": (6, 3.0)}}, "other weights: to_k"),
    ],
)
def test_the_reason_is_named(changes, reason):
    other = replace(BASE, **changes)
    assert reason in BASE.differs(other)
    assert other.differs(BASE)
    assert BASE.text_side.differs(other.text_side) == ("" if "projections" in changes else BASE.differs(other))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"doors": {}},
        {"doors": {"tokens": TEXT, "other": Encoding(3)}},
        with_tokens(max_length=None),
        with_tokens(sketch=()),
        with_tokens(sketch=((1.0, 0.05), (0.0, 1.0))),  # as half precision moves it
        with_tokens(sketch=SKETCH[:1]),
        {"vocabularies": {"tokenizer_2": "1" * 64}},
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
    assert not BASE.text_side.differs(Fingerprint.of_weights(weights))


def test_a_pipeline_has_one_that_tells_its_encoder_and_needs_no_denoiser(pipe):
    mine = Fingerprint.of_text(pipe)
    assert (mine.doors["tokens"].width, mine.doors["tokens"].n_tokens) == (WIDTH, TOKENS)
    assert len(mine.doors["tokens"].sketch) == len(PROBES)
    assert mine.projections is None
    pipe.unet = None
    assert not mine.differs(Fingerprint.of_text(pipe))
    pipe.text_encoder.half().float()
    assert not mine.differs(Fingerprint.of_text(pipe))
    assert "embedded in another way" in mine.differs(Fingerprint.of_text(random_pipeline(text_seed=1)))


def test_another_tokenizer_is_seen_by_its_vocabulary_and_added_tokens_are_none(pipe):
    before = Fingerprint.of_text(pipe).vocabularies
    pipe.tokenizer.add_tokens(["<my-cat>"])
    assert vocabularies(pipe) == before
    assert before.keys() == {"tokenizer"}


def test_a_sketch_says_which_embeddings_are_far_apart():
    torch.manual_seed(0)
    embeddings = torch.randn(2, 4, 48)
    close, far = sketch(embeddings * (1 + 1e-3 * torch.randn(2, 4, 48))), sketch(torch.randn(2, 4, 48))
    assert sketch(3 * embeddings) == sketch(embeddings)  # of directions alone
    doors = [Encoding(48, 4, sketch=of) for of in (sketch(embeddings), close, far)]
    assert not doors[0].differs(doors[1])
    assert doors[0].differs(doors[2])
