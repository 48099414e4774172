"""One contract: attach, watch, detach; afterwards the denoiser is in the state that it was in before."""

import pytest
import torch

from sepme_diffusers import ErasureNotInForce
from sepme_diffusers.doors.attachment import attached
from sepme_diffusers.doors.family import TOKENS
from sepme_diffusers.doors.linears import text_projections
from sepme_diffusers.text.encoding import encode
from small import PROMPTS, random_xl_pipeline


class Blank:
    """Puts one embedding in the place of any other, and adds to what one Linear gives."""

    def __init__(self, embedding, at_linears=False):
        self.embedding, self.at_linears, self.asked = embedding, at_linears, []

    def edit(self, embeddings, pictures):
        self.asked.append((sorted(embeddings), pictures))
        return {TOKENS: self.embedding.expand_as(embeddings[TOKENS])}, "reading"

    def change(self, name, reading):
        assert reading == "reading"
        return torch.ones(())


@pytest.fixture
def unet(pipe):
    return pipe.unet


@pytest.fixture
def text(pipe):
    return encode(pipe, PROMPTS)


def hooks(module):
    return [[*m._forward_hooks, *m._forward_pre_hooks] for m in module.modules()]


@torch.no_grad()
def run(unet, text, *positional, **named):
    return unet(torch.ones(len(text), 4, 8, 8), 5, *positional or (text,), **named).sample


def test_text_is_edited_however_it_is_given_and_the_callers_arguments_stay(unet, text):
    plain, kept = run(unet, text), text.clone()
    with attached(unet, Blank(torch.zeros(()))) as attachment:
        given = run(unet, text)
        with torch.no_grad():
            named = unet(torch.ones(2, 4, 8, 8), timestep=5, encoder_hidden_states=text).sample
        assert attachment.fault() == ""
    assert torch.equal(given, named)
    assert torch.equal(given, run(unet, torch.zeros_like(text)))
    assert torch.equal(text, kept)
    assert torch.equal(run(unet, text), plain)


def test_afterwards_no_hook_is_left_also_after_an_error(unet, text):
    before = hooks(unet)

    def fail_inside():
        with attached(unet, Blank(torch.zeros(()), at_linears=True)):
            run(unet, text)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail_inside()
    assert hooks(unet) == before


def test_linears_are_changed_behind_what_they_give_and_watched(unet, text):
    seen = {}
    names = list(text_projections(unet))
    with attached(unet, Blank(torch.zeros(()), at_linears=True)):
        for name, module in text_projections(unet).items():
            module.register_forward_hook(lambda m, inputs, output, name=name: seen.setdefault(name, output))
        run(unet, text)
        assert sorted(seen) == sorted(names)
        assert all((output == 1).all() for output in seen.values())  # 0 Wᵀ + 1
        first = unet.get_submodule(names[0].rpartition(".")[0])
        first.processor = lambda attention, hidden_states, *_, **__: hidden_states
        with pytest.raises(ErasureNotInForce, match="bypassed"):
            run(unet, text)


def test_a_pass_that_goes_round_the_door_or_brings_no_text_is_refused(unet, text):
    latents = torch.ones(2, 4, 8, 8)
    with attached(unet, Blank(torch.zeros(()))):
        with pytest.raises(ErasureNotInForce, match="forward was called directly"):
            unet.forward(latents, 5, text)
        with pytest.raises(ErasureNotInForce, match="brought no text by any of"):
            unet(latents, 5, None)
        with pytest.raises(ErasureNotInForce, match="forward was called directly"):
            unet.forward(latents, 5, text)  # also after a pass that failed behind the door


def test_the_pooled_embedding_is_replaced_in_a_copy_of_its_dictionary():
    pipe = random_xl_pipeline()
    pooled = {"text_embeds": torch.ones(1, 64), "time_ids": torch.zeros(1, 6)}

    class Pooled(Blank):
        def edit(self, embeddings, pictures):
            self.asked.append((sorted(embeddings), pictures))
            return {"pooled": 2 * embeddings["pooled"]}, None

    def draw(added):
        with torch.no_grad():
            return pipe.unet(torch.ones(1, 4, 16, 16), 5, torch.ones(1, 16, 96), added_cond_kwargs=added).sample

    edit = Pooled(torch.zeros(()))
    with attached(pipe.unet, edit):
        edited = draw(pooled)
    assert edit.asked == [(["pooled", "tokens"], 1)]
    assert (pooled["text_embeds"] == 1).all()
    assert torch.equal(edited, draw({**pooled, "text_embeds": torch.full((1, 64), 2.0)}))
