"""What holds on a CUDA device; left out where there is none."""

from dataclasses import replace

import pytest
import torch

from sepme_diffusers import SepMEPipeline, pocket
from sepme_diffusers.text.encoding import encode

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STYLES = ["woodcut", "neon"]
PROMPTS = ["a fox in the style of woodcut", "a neon owl"]


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def cuda_pipe(request):
    pipe = SepMEPipeline.from_pretrained(pocket.path()).to("cuda", request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def loaded(cuda_pipe):
    cuda_pipe.load_sepme(pocket.bank("styles"), plain_pipelines="standing")
    yield cuda_pipe
    cuda_pipe.unload_sepme()


def draw(pipe, prompts, **call):
    """Latents of a few steps; the same for the same arguments."""
    seeds = [torch.Generator("cuda").manual_seed(seed) for seed in range(len(prompts))]
    settings = {"num_inference_steps": 5, "guidance_scale": 4.0, "generator": seeds, "output_type": "latent"}
    return pipe(prompts, **settings | call).images


@pytest.fixture(autouse=True)
def deterministic():
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def test_restoring_is_exact_and_guards_do_not_move(cuda_pipe):
    prompts = ["", "watermark", "neon", "a fox in the style of woodcut"]
    plain = draw(cuda_pipe, prompts)
    cuda_pipe.load_sepme(pocket.bank("styles"))
    others = [name for name in cuda_pipe.erasable if name != "neon"]
    erased = draw(cuda_pipe, prompts, erased=others)
    assert torch.equal(draw(cuda_pipe, prompts, erased=[]), plain)
    cuda_pipe.unload_sepme()
    assert torch.equal(draw(cuda_pipe, prompts), plain)
    assert torch.equal(erased[:3], plain[:3])
    assert not torch.allclose(erased[3], plain[3], atol=0.1)


def test_a_row_of_a_mixed_batch_is_edited_as_in_a_batch_of_one_set(loaded):
    mixed = draw(loaded, PROMPTS, erased=[STYLES, []])
    assert torch.equal(mixed[0], draw(loaded, PROMPTS, erased=STYLES)[0])
    assert torch.equal(mixed[1], draw(loaded, PROMPTS, erased=[])[1])


def test_the_judge_finds_no_erased_style_and_every_restored_one(loaded):
    for erased, low, high in ((STYLES, 0.0, 0.2), ([], 0.5, 1.0)):
        styles, _ = pocket.classify(draw(loaded, PROMPTS, erased=erased, output_type="pil"))
        for row, style in zip(styles, STYLES, strict=True):
            assert low <= float(row[pocket.style_classes.index(style)]) <= high


def test_a_pass_waits_for_the_device_nowhere_in_our_hooks(cuda_pipe):
    """Gates are noted on the device; what was noted is read when somebody asks for it."""
    bank = pocket.bank("styles").subset(STYLES)
    gated = {
        name: bank[name].increment.gated(encode(cuda_pipe, bank[name].concept.prompts).cpu(), 0.5) for name in bank
    }
    entries = [replace(bank[name], increment=increment) for name, increment in gated.items()]
    cuda_pipe.load_sepme(bank.with_entries(entries), plain_pipelines="standing")
    try:
        cuda_pipe.set_erased(STYLES)
        text = encode(cuda_pipe, PROMPTS).to(cuda_pipe.unet.dtype)
        latents = torch.randn(2, 4, 16, 16, device="cuda", dtype=text.dtype)
        step = torch.tensor(10, device="cuda")
        with torch.no_grad():
            cuda_pipe.unet(latents, step, text)  # copies the factors to the device
            torch.cuda.set_sync_debug_mode("error")
            try:
                cuda_pipe.unet(latents, step, text)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        draw(cuda_pipe, PROMPTS, erased=STYLES)
        assert cuda_pipe.last_call.opened == ({"woodcut": True, "neon": False}, {"woodcut": False, "neon": True})
    finally:
        cuda_pipe.unload_sepme()


def test_twenty_sets_use_the_graph_that_inductor_made_for_the_first():
    pipe = SepMEPipeline.from_pretrained(pocket.path()).to("cuda")
    pipe.set_progress_bar_config(disable=True)
    pipe.load_sepme(pocket.bank("styles"))
    eager = draw(pipe, PROMPTS, erased=STYLES)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True)
    counters = torch._dynamo.utils.counters["stats"]
    torch.testing.assert_close(draw(pipe, PROMPTS, erased=STYLES), eager, atol=2e-2, rtol=2e-2)
    graphs = counters["unique_graphs"]
    names = pipe.erasable
    for size in range(20):
        draw(pipe, PROMPTS, erased=names[size % 7 : size % 7 + size % 5], num_inference_steps=1)
    assert counters["unique_graphs"] == graphs
    torch.compiler.reset()


def test_model_offload_leaves_the_erasure_in_place(cuda_pipe):
    pipe = SepMEPipeline.from_pretrained(pocket.path())
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload()
    pipe.load_sepme(pocket.bank("styles"))
    styles, _ = pocket.classify(draw(pipe, PROMPTS, erased=STYLES, output_type="pil"))
    assert max(float(row[pocket.style_classes.index(s)]) for row, s in zip(styles, STYLES, strict=True)) < 0.2
