"""SDXL is told the text by two doors, tokens and pooled embedding; what is promised of a picture holds for both."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import SepMETrainer
from sepme_diffusers.text.encoding import encode_doors
from small import CLOSED, CONCEPTS, latents, random_xl_pipeline

NAMES = ["neon", "cat", "pencil"]
GUARDED = ["", "watermark", "cat"]
# A prompt that each concept's increment reads.
OWN = [concept.prompts[0] for concept in CONCEPTS]
# Of the same wording as the prompt, so that every token has one in its place.
ANCHORS = ("a cat in the style of ink", "ink dog")


@pytest.fixture(scope="module")
def bank():
    return SepMETrainer(random_xl_pipeline(), replace(CLOSED, gain=1.0, reserve=0.1), ["watermark"]).erase(
        [replace(CONCEPTS[0], anchors=tuple((anchor,) for anchor in ANCHORS)), *CONCEPTS[1:]]
    )


@pytest.fixture(scope="module")
def tokens_alone(bank):
    """The same bank without what it does at the pooled door."""
    return bank.with_entries(replace(e, increment=replace(e.increment, doors={})) for e in bank.values())


@pytest.fixture
def pipe(bank):
    pipe = random_xl_pipeline()
    pipe.load_sepme(bank)
    return pipe


def pooled_that_is_read(pipe, prompts, erased):
    """The pooled embeddings that the denoiser's first Linear gets for the prompts, (n, 64)."""
    inputs = []
    hook = pipe.unet.add_embedding.linear_1.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    pipe(prompts, num_inference_steps=1, guidance_scale=1.0, output_type="latent", erased=erased)
    hook.remove()
    return inputs[0][:, :64]


def picture(pipe, tokens, pooled, **kwargs):
    """Latents of a picture that is told one prompt by its tokens and another by its pooled embedding."""
    first, second = encode_doors(pipe, [tokens])["tokens"], encode_doors(pipe, [pooled])["pooled"][:, 0]
    seed = torch.Generator().manual_seed(0)
    return pipe(
        prompt_embeds=first, pooled_prompt_embeds=second, num_inference_steps=2, guidance_scale=1.0, generator=seed,
        output_type="latent", **kwargs,
    ).images  # fmt: skip


def test_every_guard_reads_zero_at_both_doors(pipe):
    before = latents(pipe, GUARDED)
    assert torch.equal(latents(pipe, GUARDED, erased=["neon", "pencil"]), before)
    assert torch.equal(pooled_that_is_read(pipe, GUARDED, ["neon", "pencil"]), pooled_that_is_read(pipe, GUARDED, []))
    assert not torch.equal(latents(pipe, OWN, erased=["neon", "pencil"]), latents(pipe, OWN))


def test_an_erasure_is_the_same_whatever_else_is_erased(pipe):
    """For the name of a concept, which every other increment guards."""
    alone = latents(pipe, "cat", erased=["cat"])
    assert not torch.equal(alone, latents(pipe, "cat"))
    assert torch.equal(latents(pipe, "cat", erased=NAMES), alone)


def test_edits_of_the_pooled_embedding_add_up(pipe):
    plain = pooled_that_is_read(pipe, OWN, [])
    moved = {name: pooled_that_is_read(pipe, OWN, [name]) - plain for name in NAMES}
    assert all(moved[name][index].norm() > 1e-2 * plain[index].norm() for index, name in enumerate(NAMES))
    for names in (["neon", "pencil"], NAMES):
        together = pooled_that_is_read(pipe, OWN, names) - plain
        torch.testing.assert_close(together, sum(moved[name] for name in names), rtol=1e-5, atol=1e-5)


def test_order_leaves_no_trace_and_restoring_is_exact(pipe, bank):
    before, erased = latents(pipe, OWN), latents(pipe, OWN, erased=NAMES)
    for order in (NAMES[::-1], ["pencil", "neon", "cat"]):
        pipe.set_erased([])
        for name in order:
            pipe.erase(name)
        assert torch.equal(latents(pipe, OWN), erased)
    pipe.restore("cat")
    assert torch.equal(latents(pipe, OWN), latents(pipe, OWN, erased=["neon", "pencil"]))
    pipe.restore_all()
    assert torch.equal(latents(pipe, OWN), before)
    pipe.unload_sepme()
    pipe.load_sepme(bank.subset(NAMES[::-1]))
    assert torch.equal(latents(pipe, OWN), before)


def test_each_prompt_of_a_batch_has_a_set_of_its_own(pipe):
    sets = [["neon"], [], ["cat", "pencil"]]
    mixed, pooled = latents(pipe, OWN, erased=sets), pooled_that_is_read(pipe, OWN, sets)
    for index, names in enumerate(sets):
        assert torch.equal(mixed[index], latents(pipe, OWN, erased=names)[index])
        assert torch.equal(pooled[index], pooled_that_is_read(pipe, OWN, names)[index])


def test_a_concept_that_the_pooled_embedding_alone_tells_is_erased(pipe, tokens_alone):
    """Tokens blank: the picture goes to the anchor's. Without the second door it stays where it was, to the bit."""
    prompt, anchor = OWN[0], ANCHORS[0]
    told, wanted = picture(pipe, "", prompt), picture(pipe, "", anchor)
    erased = picture(pipe, "", prompt, erased=["neon"])
    assert (erased - wanted).norm() < 0.1 * (told - wanted).norm()
    pipe.unload_sepme()
    pipe.load_sepme(tokens_alone)
    assert torch.equal(picture(pipe, "", prompt, erased=["neon"]), told)


def test_both_doors_bring_a_picture_nearer_to_the_anchors_than_tokens_alone(pipe, tokens_alone):
    prompt, anchor = OWN[0], ANCHORS[0]
    told, wanted = picture(pipe, prompt, prompt), picture(pipe, anchor, anchor)
    both = picture(pipe, prompt, prompt, erased=["neon"])
    pipe.unload_sepme()
    pipe.load_sepme(tokens_alone)
    half = picture(pipe, prompt, prompt, erased=["neon"])
    gap = (told - wanted).norm()
    assert (both - wanted).norm() < 0.2 * gap
    assert (both - wanted).norm() < 0.5 * (half - wanted).norm()
