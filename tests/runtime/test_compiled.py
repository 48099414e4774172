"""A compiled UNet: what is erased acts whenever it was compiled, and a changed set compiles nothing anew."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from compiling import WAYS, compile_whole
from sepme_diffusers import SepMETrainer
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.text.encoding import encode
from small import CLOSED, CONCEPTS, PROMPTS, WIDTH, draw, random_pipeline, wide

TEXT_SIDE, PER_MODULE = "neon", "pencil"
BOTH = (TEXT_SIDE, PER_MODULE)


def shallow_pipeline():
    """With a UNet of few layers, because a compiler needs seconds for each."""
    pipe = random_pipeline()
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16,), layers_per_block=1, attention_head_dim=2, norm_num_groups=4,
        cross_attention_dim=WIDTH, down_block_types=("CrossAttnDownBlock2D",), mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for weight in projection_weights(pipe.unet).values():
            weight.mul_(9)
    return pipe


@pytest.fixture
def pipe():
    return shallow_pipeline()


@pytest.fixture(scope="module")
def bank():
    """A text-side and a per-module increment."""
    pipe = shallow_pipeline()
    bank = SepMETrainer(pipe, CLOSED, guards=["watermark"]).erase(CONCEPTS).subset(BOTH)
    increment = bank[PER_MODULE].increment.expand(projection_weights(pipe.unet))
    return bank.with_entries([replace(bank[PER_MODULE], increment=increment)])


def near(latents, expected):
    return torch.allclose(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def expected(bank):
    """Latents of a pipeline that is not compiled, by what is erased; no two are alike."""
    pipe = shallow_pipeline()
    pipe.load_sepme(bank)
    found = {names: draw(pipe, erased=names) for names in ((), BOTH, (PER_MODULE,))}
    assert not any(near(found[one], found[other]) for one in found for other in found if one != other)
    return found


@pytest.mark.parametrize(("compiling", "when"), WAYS)
def test_compiled_before_or_after(pipe, bank, graphs, expected, compiling, when):
    """A graph traced without the hooks must not be used again once they are there."""
    if when in ("first", "after a compiled call"):
        compiling(pipe, graphs)
    if when == "after a compiled call":
        assert near(draw(pipe), expected[()])
    pipe.load_sepme(bank)
    if when == "after loading":
        compiling(pipe, graphs)
    pipe.set_erased(BOTH)
    if when == "after erasing":
        assert near(draw(pipe), expected[BOTH])
        compiling(pipe, graphs)
    assert near(draw(pipe), expected[BOTH])
    assert graphs.frame_count > 0
    pipe.restore(TEXT_SIDE)
    assert near(draw(pipe), expected[PER_MODULE,])
    assert near(draw(pipe, erased=BOTH), expected[BOTH])
    pipe.unload_sepme()
    assert near(draw(pipe), expected[()])


def test_changing_the_set_compiles_nothing_anew(pipe, text_bank, bank, graphs):
    """Twenty sets of two banks of more ranks than the text is wide, empty and large ones, in one graph."""
    pipe.load_sepme(wide(text_bank), name="first")
    pipe.load_sepme(bank, name="second")
    compile_whole(pipe, graphs)
    draw(pipe)
    compiled = graphs.frame_count
    assert compiled > 0
    for size in range(20):
        pipe.set_erased(pipe.erasable[-4 * size - 1 : -size - 1])
        assert len(pipe.erased) == 3 * size
        draw(pipe)
    assert graphs.frame_count == compiled


def test_an_exported_unet_keeps_the_erasure_it_was_exported_with(pipe, bank):
    pipe.load_sepme(bank, plain_pipelines="standing")
    pipe.set_erased(BOTH)
    latents, step, text = torch.randn(2, 4, 8, 8), torch.tensor(10), encode(pipe, PROMPTS)
    exported = torch.export.export(pipe.unet.eval(), (latents, step, text), strict=False).module()
    with torch.no_grad():
        expected = pipe.unet(latents, step, text).sample
        pipe.restore_all()
        plain = pipe.unet(latents, step, text).sample
        torch.testing.assert_close(exported(latents, step, text).sample, expected)
    assert not torch.allclose(plain, expected, atol=1e-3)
