import copy

import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    PixArtTransformer2DModel,
    StableDiffusionControlNetPipeline,
)

from sepme_diffusers import ErasureNotInForce, attach
from sepme_diffusers.doors import registry
from sepme_diffusers.doors.family import TOKENS, Door, Family
from sepme_diffusers.doors.registry import denoisers_of, drawing_denoisers, family_of, register
from sepme_diffusers.runtime.erasures import Erasures
from sepme_diffusers.runtime.snapshot import LoadOptions
from sepme_diffusers.text.encoding import encode
from small import PROMPTS, WIDTH

PIXART = Family(
    name="pixart",
    denoisers=("PixArtTransformer2DModel",),
    doors=(Door(TOKENS, "encoder_hidden_states"),),
    entry="pos_embed",
    sample="hidden_states",
    reference="arXiv 2310.00426",
)


@pytest.fixture
def pixart(monkeypatch):
    """A transformer of a family that is registered for one test; its text goes through a projection first."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        cross_attention_dim=16, out_channels=8, num_embeds_ada_norm=8, caption_channels=WIDTH,
    ).eval()  # fmt: skip


@pytest.fixture
def with_pixart(pipe, pixart):
    """A pipeline that has the transformer in the place of its UNet."""
    pipe.unet = pixart
    return pipe


def test_a_denoiser_of_an_unknown_family_is_refused_with_its_arguments(with_pixart):
    with pytest.raises(TypeError, match=r"PixArtTransformer2DModel \(component 'unet'\).*encoder_hidden_states"):
        denoisers_of(with_pixart)


def test_a_registered_family_erases_restores_and_guards_to_the_bit(with_pixart, pixart, text_bank):
    """A row of a table is all that a transformer needs, whatever it does with the text behind its door."""
    register(PIXART)
    text = encode(with_pixart, ["", *PROMPTS])
    arguments = {
        "hidden_states": torch.randn(3, 4, 8, 8), "timestep": torch.full((3,), 5), "encoder_hidden_states": text,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip

    @torch.no_grad()
    def run():
        return pixart(**arguments).sample

    plain = run()
    erasures = Erasures(drawing_denoisers(with_pixart).values())
    erasures.load("bank", text_bank, LoadOptions(plain_pipelines=True))
    assert torch.equal(run(), plain)
    erasures.erase_exactly(lambda snapshot: {("bank", "neon"): 1.0, ("bank", "cat"): 1.0})
    erased = run()
    assert torch.equal(erased[0], plain[0])
    assert not torch.allclose(erased[1], plain[1], atol=1e-4)
    with pytest.raises(ErasureNotInForce, match="forward was called directly"):
        pixart.forward(**arguments)
    erasures.unload(["bank"])
    assert torch.equal(run(), plain)


def test_a_family_without_doors_or_with_one_twice_is_refused():
    door = Door(TOKENS, "encoder_hidden_states")
    for denoisers, doors in (((), (door,)), (("A",), ()), (("A",), (door, door))):
        with pytest.raises(ValueError, match="needs at least one class name and one door"):
            register(Family("strange", denoisers, doors, entry="x"))
    assert family_of(torch.nn.Linear(1, 1)) is None


def test_denoisers_are_found_inside_what_wraps_them_and_helpers_come_last(pipe):
    net = ControlNetModel.from_unet(pipe.unet)
    other = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=MultiControlNetModel([net, copy.deepcopy(net)]), requires_safety_checker=False
    )
    assert list(denoisers_of(other)) == ["unet", "controlnet.nets.0", "controlnet.nets.1"]
    assert list(drawing_denoisers(other)) == ["unet"]
    plain = pipe.unet
    pipe.unet = torch.compile(plain, backend="eager")
    assert denoisers_of(pipe) == {"unet": plain}


def test_one_denoiser_in_two_places_is_one(pipe):
    pipe.same = torch.nn.ModuleList([pipe.unet])
    assert list(denoisers_of(pipe)) == ["unet"]


def test_every_denoiser_of_a_pipeline_is_edited_and_watched(pipe, text_bank):
    """Wan 2.2 has two that take turns over the steps; whichever runs reads the edited text."""
    pipe.unet_2 = copy.deepcopy(pipe.unet)
    text, latents = encode(pipe, PROMPTS), torch.randn(2, 4, 8, 8)

    @torch.no_grad()
    def run(unet):
        return unet(latents, 5, text).sample

    plain = run(pipe.unet_2)
    pipe.load_sepme(text_bank, plain_pipelines="standing")
    pipe.set_erased(["neon", "pencil"])
    assert torch.equal(run(pipe.unet), run(pipe.unet_2))
    assert not torch.allclose(run(pipe.unet_2), plain, atol=1e-4)
    pipe.unet_2 = copy.deepcopy(pipe.unet)
    with pytest.raises(ErasureNotInForce, match="replaced"):
        pipe.check_erased()


def test_a_pipeline_without_a_denoiser_that_reads_text_is_refused(pipe):
    pipe.unet = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="no denoiser that reads text"):
        attach(pipe).erased  # noqa: B018
