"""What surrounds a pipeline: ControlNets, other code's hooks, precision, torch's defaults, training, requests."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionPanoramaPipeline,
    TextToVideoZeroPipeline,
)
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

from sepme_diffusers import ErasureNotInForce, attach
from sepme_diffusers.doors.linears import text_projections
from sepme_diffusers.runtime.erasures import erasures_of
from sepme_diffusers.text.encoding import encode
from small import latents, random_pipeline


@pytest.fixture
def loaded(pipe, mixed_bank):
    pipe.load_sepme(mixed_bank)
    return pipe


# --- ControlNets


def controlnet(pipe):
    """A ControlNet that steers: its outputs are zero when it is new."""
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16,)).eval()
    with torch.no_grad():
        for block in (*net.controlnet_down_blocks, net.controlnet_mid_block):
            block.weight.normal_()
    return net


def steered(pipe, net):
    made = attach(StableDiffusionControlNetPipeline(**pipe.components, controlnet=net, requires_safety_checker=False))
    made.set_progress_bar_config(disable=True)
    return made


def steer(pipe, **kwargs):
    return latents(pipe, "neon cat", image=torch.zeros(1, 3, 8, 8), **kwargs)


class BlindToHooks(AttnProcessor):
    """Reads to_k's weight instead of calling to_k."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        keys = text @ attn.to_k.weight.T
        return attn.to_out[0](attn.to_q(hidden_states) * keys.mean(dim=1, keepdim=True))


@pytest.mark.slow
def test_a_controlnet_that_was_compiled_before_anything_was_erased_reads_the_edited_text(pipe, text_bank, graphs):
    net = controlnet(pipe)
    one = steered(pipe, net)
    one.load_sepme(text_bank)
    plain, expected = steer(one, erased=[]), steer(one, erased=["neon"])
    fresh = steered(pipe, copy.deepcopy(net))
    fresh.unload_sepme()
    fresh.controlnet.compile(backend=graphs)
    torch.testing.assert_close(steer(fresh), plain, rtol=1e-4, atol=1e-4)
    assert graphs.frame_count > 0
    fresh.load_sepme(text_bank)
    torch.testing.assert_close(steer(fresh, erased=[]), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(steer(fresh, erased=["neon"]), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-3)


def test_a_processor_of_a_controlnet_does_not_matter_for_text_side_increments(pipe, text_bank):
    """The text is edited before anything inside reads it: the guarded prompt's edited text gives the same picture."""
    net = controlnet(pipe)
    for block in net.down_blocks[0].attentions:
        block.transformer_blocks[0].attn2.set_processor(BlindToHooks())
    one = steered(pipe, net)
    one.load_sepme(text_bank)
    increment = text_bank["neon"].increment
    e, blank = encode(one, ["neon cat"]), encode(one, [""])
    edited = e + e @ increment.A.T @ increment.B.T
    embeds = {"prompt_embeds": edited, "negative_prompt_embeds": blank, "image": torch.zeros(1, 3, 8, 8)}
    by_hand = latents(one, None, erased=[], **embeds)
    torch.testing.assert_close(steer(one, erased=["neon"]), by_hand, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(steer(one, erased=[]), by_hand, atol=1e-2)


def test_a_controlnet_shared_with_another_unets_pipeline_is_plain_there(pipe, text_bank):
    """Also while the pipeline that erases is in the middle of a call."""
    net = controlnet(pipe)
    mine, plain = steered(pipe, net), random_pipeline()
    theirs = StableDiffusionControlNetPipeline(**plain.components, controlnet=net, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    expected = steer(theirs)
    mine.load_sepme(text_bank)
    found = []

    def meanwhile(*_):
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(steer, theirs).result())
        return {}

    erased = steer(mine, erased=["neon"], callback_on_step_end=meanwhile)
    assert len(found) == 3
    assert all(torch.equal(picture, expected) for picture in (*found, steer(theirs)))
    assert not torch.allclose(erased, expected, atol=1e-3)


def test_threads_that_use_a_controlnet_first_register_its_edit_once(loaded):
    net, erasures = controlnet(loaded), erasures_of(loaded.unet)
    start = threading.Barrier(8)

    def use(_):
        start.wait(30)
        erasures.helpers.follow([net])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert [len(net._forward_pre_hooks), len(net._forward_hooks), len(net.conv_in._forward_pre_hooks)] == [1, 2, 1]


# --- hooks of other code


class PutsBack:
    def __init__(self, e):
        self.e = e

    def __call__(self, module, args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": self.e}


def test_outside_any_call_a_hook_that_comes_after_the_edit_is_noticed_in_the_pass(pipe, text_bank):
    pipe.load_sepme(text_bank, plain_pipelines="standing")
    e, noise = encode(pipe, ["neon cat"]), torch.zeros(1, 4, 8, 8)

    def act():
        with torch.no_grad():
            return pipe.unet(noise, 1, encoder_hidden_states=e).sample

    plain = act()
    pipe.set_erased(["neon"])
    erased = act()
    pipe.unet.register_forward_pre_hook(PutsBack(e), with_kwargs=True)
    with pytest.raises(ErasureNotInForce, match=r"comes after the edit and could undo it.*check_erased\(\)"):
        act()
    pipe.restore_all()
    assert torch.equal(act(), plain)
    pipe.set_erased(["neon"])
    assert pipe.check_erased() == ("neon",)
    assert torch.equal(act(), erased)


def test_a_pass_that_began_before_the_first_bank_was_loaded_goes_on(pipe, text_bank):
    """The hooks come between its beginning and its first layer; nothing is erased, so nothing is amiss."""
    plain = latents(pipe, "neon cat")

    def load(*_):
        if not pipe.erasable:
            pipe.load_sepme(text_bank)

    handle = pipe.unet.time_proj.register_forward_hook(load)
    assert torch.equal(latents(pipe, "neon cat"), plain)
    handle.remove()
    assert pipe.erasable


# --- precision


GUARDS = ["", "watermark"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_guards_do_not_move_by_a_bit_in_half_precision(mixed_bank, dtype):
    pipe = random_pipeline().to(dtype)
    pipe.load_sepme(mixed_bank)
    for prompt in GUARDS:
        assert torch.equal(latents(pipe, prompt, erased=pipe.erasable), latents(pipe, prompt, erased=[]))
    assert not torch.equal(latents(pipe, "neon cat", erased=["neon"]), latents(pipe, "neon cat", erased=[]))


def test_guards_do_not_move_by_a_bit_under_autocast(loaded):
    """The encoder rounds at every layer, and the embedding's own dtype does not say so."""
    with torch.autocast("cpu", torch.bfloat16):
        for prompt in GUARDS:
            plain = latents(loaded, prompt, erased=[])
            assert torch.equal(latents(loaded, prompt, erased=loaded.erasable), plain)
        assert not torch.equal(latents(loaded, "neon cat", erased=["neon"]), latents(loaded, "neon cat", erased=[]))
    assert torch.equal(latents(loaded, "", erased=loaded.erasable), latents(loaded, "", erased=[]))


def test_an_increment_that_half_precision_rounds_to_nothing_is_refused(text_bank):
    entry = text_bank["neon"]
    faint = text_bank.with_entries([replace(entry, metrics={**entry.metrics, "reach": 5e-4})])
    pipe = random_pipeline()
    pipe.load_sepme(faint)
    latents(pipe, "neon cat", erased=["neon"])
    pipe.to(torch.bfloat16)
    with pytest.raises(ErasureNotInForce, match=r"\['neon'\] should be erased.*reads 5.0e-04 .* use float32"):
        latents(pipe, "neon cat", erased=["neon"])
    latents(pipe, "neon cat", erased=["pencil"])


def test_another_layer_of_the_text_encoder_is_refused_and_named(loaded):
    with pytest.raises(ErasureNotInForce, match=r"\['neon'\] should be erased, but .* clip_skip=1 reads another one"):
        latents(loaded, "neon cat", erased=["neon"], clip_skip=1)


# --- torch's defaults, PEFT, training


@pytest.fixture
def defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("change", [
    lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.bfloat16),
    lambda: torch.set_default_device("meta")], ids=["float64", "bfloat16", "meta"])  # fmt: skip
def test_torchs_defaults_do_not_matter(pipe, mixed_bank, defaults, change):
    both = ["neon", "woodcut"]
    other = random_pipeline()
    other.load_sepme(mixed_bank)
    expected = latents(other, "neon woodcut cat", erased=both)
    change()
    pipe.load_sepme(mixed_bank, plain_pipelines="standing")
    pipe.set_erased(both)
    pipe.check_erased()
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    assert torch.equal(latents(pipe, "neon woodcut cat"), expected)


class ByKeyword(AttnProcessor):
    """Calls to_k and to_v as some processors do."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        query, (key, value) = (
            attn.to_q(hidden_states),
            (each(input=encoder_hidden_states) for each in (attn.to_k, attn.to_v)),
        )
        query, key, value = (attn.head_to_batch_dim(part) for part in (query, key, value))
        return attn.to_out[0](attn.batch_to_head_dim(torch.bmm(attn.get_attention_scores(query, key), value)))


def test_projections_may_be_called_by_keyword(loaded):
    both = ["neon", "woodcut"]
    expected = latents(loaded, "neon woodcut cat", erased=both)
    for name, attention in loaded.unet.named_modules():
        if name.endswith("attn2"):
            attention.set_processor(ByKeyword())
    torch.testing.assert_close(latents(loaded, "neon woodcut cat", erased=both), expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(latents(loaded, "neon woodcut cat", erased=["neon"]), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("copied", "both", "holds"),
    [
        ("to_k", ["neon", "cat"], True),
        ("to_k", ["neon", "woodcut"], False),
        ("conv_in", ["neon", "woodcut"], True),
    ],
    ids=["text-side", "per-module", "the entry"],
)
def test_modules_to_save_of_peft_hold_or_are_refused(pipe, mixed_bank, copied, both, holds):
    """PEFT copies such a module, with its hooks, and runs the copy. Only per-module increments act behind to_k."""
    pipe.load_sepme(mixed_bank.subset(both))
    expected = latents(pipe, "neon woodcut cat", erased=both)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], modules_to_save=[copied]))
    if holds:
        torch.testing.assert_close(latents(pipe, "neon woodcut cat", erased=both), expected)
    else:
        with pytest.raises(ErasureNotInForce, match=r"\['neon', 'woodcut'\] should be erased, but .*attn2.to_k"):
            latents(pipe, "neon woodcut cat", erased=both)
    torch.testing.assert_close(latents(pipe, "a dog", erased=[]), latents(random_pipeline(), "a dog"))
    pipe.unload_sepme()
    torch.testing.assert_close(latents(pipe, "a dog"), latents(random_pipeline(), "a dog"))


def test_dynamic_quantisation_holds_for_text_side_increments_and_is_refused_for_per_module_ones(pipe, mixed_bank):
    pipe.load_sepme(mixed_bank.subset(["neon"]), name="text")
    plain, erased = (latents(pipe, "neon cat", erased=some) for some in ([], ["neon"]))
    torch.ao.quantization.quantize_dynamic(pipe.unet, {torch.nn.Linear}, inplace=True)
    found = latents(pipe, "neon cat", erased=["neon"])
    assert (found - erased).abs().mean() < 0.2 * (found - plain).abs().mean()
    other = random_pipeline()
    other.load_sepme(mixed_bank)
    torch.ao.quantization.quantize_dynamic(other.unet, {torch.nn.Linear}, inplace=True)
    with pytest.raises(ErasureNotInForce, match=r"\['woodcut'\] should be erased, but .*were replaced"):
        latents(other, "woodcut cat", erased=["woodcut"])


@pytest.mark.parametrize("grad_of", ["text", "weights"])
def test_gradient_checkpointing_through_an_erased_unet_gives_the_same_gradient(pipe, mixed_bank, grad_of):
    """Someone trains on a pipeline while something is erased: a part of the pass runs again in the backward pass."""
    pipe.load_sepme(mixed_bank, plain_pipelines="standing")
    pipe.set_erased(["neon", "woodcut"])
    unet, noise = pipe.unet.train(), torch.randn(1, 4, 8, 8, generator=torch.manual_seed(0))

    def gradient():
        e = encode(pipe, ["neon woodcut cat"]).requires_grad_(grad_of == "text")
        of = e if grad_of == "text" else next(iter(text_projections(unet).values())).weight
        return torch.autograd.grad(unet(noise, 10, e).sample.square().mean(), of)[0]

    expected = gradient()
    unet.enable_gradient_checkpointing()
    found = gradient()
    assert expected.abs().max() > 0
    torch.testing.assert_close(found, expected)


# --- pipelines with an order of their own


@pytest.mark.parametrize("kind", [StableDiffusionPanoramaPipeline, TextToVideoZeroPipeline])
def test_pipelines_that_mix_the_rows_of_prompts_take_one_set_for_a_call(pipe, text_bank, kind):
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    other = attach(kind(**parts, requires_safety_checker=False))
    other.load_sepme(text_bank)
    with pytest.raises(ValueError, match=f"{kind.__name__} mixes the rows of several prompts"):
        other(["neon cat", "pencil cat"], erased=[["neon"], ["pencil"]])


# --- requests, and tensors of a loaded bank


def test_a_request_whose_bank_was_unloaded_raises_instead_of_drawing_without(pipe, text_bank):
    pipe.load_sepme(text_bank.subset(["neon"]), name="one")
    pipe.load_sepme(text_bank.subset(["cat"]), name="two")
    floor, default, none = pipe.for_request(always=["neon"]), pipe.for_request(erased=["neon"]), pipe.for_request()
    latents(none, "a cat", erased=["cat"])
    pipe.unload_sepme("one")
    for request in (floor, default):
        for act in (lambda: latents(request, "neon cat"), lambda: request.erased, request.check_erased):  # noqa: B023
            with pytest.raises(ErasureNotInForce, match=r"to erase \['one/neon'\], which is no longer loaded"):
                act()
    with pytest.raises(ErasureNotInForce, match="no longer loaded"):
        latents(floor, "neon cat", erased=["cat"])
    latents(none, "a cat", erased=["cat"])


def test_a_loaded_tensor_that_is_changed_in_place_does_not_change_what_acts(pipe, text_bank):
    """Of more increments than fit beside each other: each set gathers its own, when it is first used."""
    neon = text_bank["neon"]
    entries = [
        replace(neon, increment=copy.deepcopy(neon.increment)).renamed(f"neon {number}") for number in range(70)
    ]
    pipe.load_sepme(text_bank.subset(["cat"]).with_entries(entries))
    expected = latents(pipe, "neon cat", erased=["neon 1"])
    entries[1].increment.B.zero_()
    entries[2].increment.B.zero_()
    assert torch.equal(latents(pipe, "neon cat", erased=["neon 1"]), expected)
    with pytest.raises(ErasureNotInForce, match="changed in place; load the bank again"):
        latents(pipe, "neon cat", erased=["neon 2"])
