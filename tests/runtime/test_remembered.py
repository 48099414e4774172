"""The text is edited once per call where a pipeline hands on the same tensor, and anew whenever that may differ."""

import pytest
import torch

from sepme_diffusers.runtime import remembered
from sepme_diffusers.runtime.remembered import Remembered
from sepme_diffusers.runtime.snapshot import LoadOptions, Snapshot
from sepme_diffusers.text.encoding import encode
from small import PROMPTS, latents


@pytest.fixture
def active(mixed_bank):
    snapshot = Snapshot.of({"bank": mixed_bank}, {"bank": LoadOptions()}, {})
    return snapshot.active([dict.fromkeys(snapshot.names.shown, 1.0)])


@pytest.fixture
def text(pipe):
    return encode(pipe, PROMPTS)


@torch.no_grad()
def edit(active, text):
    embeddings, reading = active.edit({"tokens": text}, len(text))
    return embeddings["tokens"], reading


def test_the_same_tensor_is_edited_once_and_gives_the_same_bits(active, text):
    first, second, equal = edit(active, text), edit(active, text), edit(active, text.clone())
    assert second[0] is first[0]
    assert second[1] is first[1]
    assert equal[0] is not first[0]
    assert torch.equal(equal[0], first[0])
    name = next(iter(active.module.stack.outputs))
    assert active.change(name, first[1]) is active.change(name, second[1])
    assert torch.equal(active.change(name, equal[1]), active.change(name, first[1]))


def test_a_tensor_that_was_written_to_is_edited_anew(active, text):
    first = edit(active, text)[0].clone()
    text[0] = text[1]
    again = edit(active, text)[0]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], first[0])


def test_an_edited_embedding_that_the_denoiser_writes_to_is_made_anew(active, text):
    first = edit(active, text)[0]
    expected = first.clone()
    first.zero_()
    assert torch.equal(edit(active, text)[0], expected)


def test_two_embeddings_that_take_turns_are_both_remembered(active, text):
    other = text.flip(0)
    first, second = edit(active, text)[0], edit(active, other)[0]
    assert edit(active, text)[0] is first
    assert edit(active, other)[0] is second


def test_a_new_tensor_in_the_place_of_one_that_is_gone_is_not_taken_for_it(active, text):
    kept = [edit(active, text + step)[0] for step in range(8)]
    for step in range(8):
        assert torch.equal(edit(active, text + step)[0], kept[step])
    assert len(active.remembered.entries) <= 4


def test_gradients_and_inference_tensors_are_not_remembered(active, text):
    text.requires_grad_()
    active.edit({"tokens": text}, 2)[0]["tokens"].sum().backward()
    assert text.grad is not None
    with torch.inference_mode():
        active.edit({"tokens": text.detach().clone()}, 2)
    assert active.remembered.entries == ()


def test_changes_behind_linears_are_remembered_while_there_is_room(active, text, monkeypatch):
    reading = edit(active, text)[1]
    names = list(active.module.stack.outputs)
    size = active.change(names[0], reading).numel() * 4
    monkeypatch.setattr(remembered, "_MOST_BYTES", size + 1)
    expected = [active.module.change(reading.values, name) for name in names]
    assert all(torch.equal(active.change(name, reading), change) for name, change in zip(names, expected, strict=True))
    assert list(reading.changes) == names[:1]


def test_a_call_draws_what_it_draws_without_remembering_and_keeps_nothing_afterwards(pipe, mixed_bank, monkeypatch):
    pipe.load_sepme(mixed_bank)
    made = []
    keep = Remembered.keep
    monkeypatch.setattr(Remembered, "keep", lambda self, *rest: (made.append(1), keep(self, *rest))[1])
    here = latents(pipe, PROMPTS, erased=[["neon"], ["woodcut", "cat"]])
    assert len(made) == 1  # three steps
    assert pipe.last_call.call.active.remembered.entries == ()
    monkeypatch.setattr(Remembered, "applies", staticmethod(lambda embeddings: False))
    assert torch.equal(latents(pipe, PROMPTS, erased=[["neon"], ["woodcut", "cat"]]), here)
