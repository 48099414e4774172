"""What diffusers' own pipeline tests ask of a pipeline, asked of ours with erasures active.

Those tests (PipelineTesterMixin and its relatives) are not part of the installed package; these are their equivalents.
"""

from dataclasses import replace

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import save_file

from sepme_diffusers import ErasureNotInForce, SepMEPipeline, SepMETrainer, SepMEXLPipeline, attach
from sepme_diffusers.interchange.checkpoint import single_file_tensors
from small import CLOSED, CONCEPTS, random_pipeline, random_xl_pipeline

KINDS = {
    "SD": (random_pipeline, SepMEPipeline, StableDiffusionPipeline, StableDiffusionImg2ImgPipeline),
    "XL": (random_xl_pipeline, SepMEXLPipeline, StableDiffusionXLPipeline, StableDiffusionXLImg2ImgPipeline),
}
PROMPT, STRENGTHS = "neon cat", {"neon": 3.0}


@pytest.fixture(params=KINDS, scope="module")
def made(request):
    make, *classes = KINDS[request.param]
    bank = SepMETrainer(make(), replace(CLOSED, rank=3), guards=["watermark"]).erase(CONCEPTS[:2])
    return make, bank, classes


@pytest.fixture
def pipe(made):
    make, bank, _ = made
    pipe = make()
    pipe.load_sepme(bank)
    pipe.set_erased(STRENGTHS)
    return pipe


@pytest.fixture
def classes(made):
    return made[2]


def draw(pipe, prompt=PROMPT, seed=0, **kwargs):
    seeds = [torch.Generator().manual_seed(seed + i) for i in range(len(prompt))] if isinstance(prompt, list) else None
    settings = {
        "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "pt",
        "generator": seeds or torch.Generator().manual_seed(seed),
    }  # fmt: skip
    return pipe(prompt, **settings | kwargs).images


def test_a_misspelt_erased_is_refused(pipe):
    """The plain pipelines swallow keywords that they do not know: nothing would be erased, and nothing said."""
    for keyword in ("erase", "erased_concepts", "Erased"):
        with pytest.raises(TypeError, match=f"{keyword}.*did you mean 'erased'"):
            draw(pipe, **{keyword: ["neon"]})


def test_save_load_local(pipe, made, tmp_path):
    expected = draw(pipe)
    pipe.save_pretrained(tmp_path)
    back = made[2][0].from_pretrained(tmp_path)
    back.set_progress_bar_config(disable=True)
    back.load_sepme(made[1])
    back.set_erased(STRENGTHS)
    torch.testing.assert_close(draw(back), expected, rtol=0, atol=1e-4)


def test_a_saved_folder_loads_as_the_plain_class_everywhere(pipe, classes, tmp_path):
    pipe.save_pretrained(tmp_path)
    plain = classes[1]
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is plain
    assert type(plain.from_pretrained(tmp_path)) is plain
    assert type(AutoPipelineForText2Image.from_pretrained(tmp_path)) is plain
    assert type(classes[0].from_pretrained(tmp_path)) is classes[0]


def test_auto_pipeline_and_from_pipe_share_what_is_erased(pipe, classes):
    ours, plain, img2img = classes
    expected = draw(pipe)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is img2img
    assert attach(other).erased == ("neon",)
    again = ours.from_pipe(plain.from_pipe(pipe))
    again.set_progress_bar_config(disable=True)
    assert again.erased == ("neon",)
    assert torch.equal(draw(again), expected)
    back = AutoPipelineForText2Image.from_pipe(pipe)
    back.set_progress_bar_config(disable=True)
    assert type(back) is plain
    with pytest.raises(ErasureNotInForce, match=r"attach\(pipe\)"):
        draw(back)
    assert torch.equal(draw(attach(back)), expected)


def test_inference_batch_consistent_and_single_identical(pipe):
    together = draw(pipe, [PROMPT, "a cat", "a dog"])
    assert together.shape[0] == 3
    for row, prompt in enumerate([PROMPT, "a cat", "a dog"]):
        torch.testing.assert_close(together[row], draw(pipe, prompt, seed=row)[0], rtol=0, atol=1e-4)


def test_num_images_per_prompt(pipe):
    seeds = [torch.Generator().manual_seed(i) for i in range(4)]
    both = draw(pipe, [PROMPT, "a dog"], num_images_per_prompt=2, generator=seeds)
    torch.testing.assert_close(both[1], draw(pipe, PROMPT, seed=1)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(both[2], draw(pipe, "a dog", seed=2)[0], rtol=0, atol=1e-4)


def test_dict_and_tuple_outputs_are_equivalent(pipe):
    tuple_output = pipe(PROMPT, num_inference_steps=2, guidance_scale=4.0, output_type="pt", return_dict=False,
                        generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert torch.equal(tuple_output[0], draw(pipe))


def test_components_make_the_same_pipeline(pipe, classes):
    twin = classes[0](**pipe.components)
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(draw(twin), draw(pipe))


def test_prompt_embeds_stand_for_the_prompt(pipe):
    encoded = pipe.encode_prompt(PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    keys = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
    embeds = dict(zip(keys, encoded, strict=False))
    assert torch.equal(draw(pipe, None, **embeds), draw(pipe))


def test_a_negative_prompt_is_erased_too(pipe):
    """The negative prompt goes through the same projections: it cannot bring the concept back by its absence."""
    erased = draw(pipe, "a dog", negative_prompt=PROMPT)
    assert not torch.equal(erased, draw(pipe, "a dog", negative_prompt=PROMPT, erased=[]))


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_with_and_without_guidance(pipe, scale):
    assert not torch.equal(draw(pipe, guidance_scale=scale), draw(pipe, guidance_scale=scale, erased=[]))


def test_to_dtype_and_back(pipe):
    pipe.to(torch.bfloat16)
    assert {part.dtype for part in pipe.components.values() if isinstance(part, torch.nn.Module)} == {torch.bfloat16}
    low = draw(pipe)
    assert low.isfinite().all()
    assert not torch.equal(low, draw(pipe, erased=[]))


def test_float16_save_load(pipe, classes, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path)
    back = classes[0].from_pretrained(tmp_path, torch_dtype=torch.float16)
    assert all(part.dtype == torch.float16 for part in back.components.values() if isinstance(part, torch.nn.Module))


def test_attention_slicing_changes_nothing_but_memory(pipe):
    expected = draw(pipe)
    pipe.enable_attention_slicing("max")
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)
    pipe.disable_attention_slicing()
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=1e-4)


def test_callbacks_see_every_step_and_may_stop(pipe):
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append((step, tuple(tensors)))
        pipe._interrupt = step == 1
        return tensors

    draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"],
         num_inference_steps=4)  # fmt: skip
    assert seen == [(step, ("latents", "prompt_embeds")) for step in (0, 1)]
    with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
        draw(pipe, callback_on_step_end=note, callback_on_step_end_tensor_inputs=["nothing"])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_any_scheduler(pipe, scheduler):
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = draw(pipe, erased=[])
    assert not torch.equal(draw(pipe), expected)
    assert torch.equal(draw(pipe, erased=[]), expected)


def test_guidance_rescale_clip_skip_and_sizes(pipe):
    for kwargs in ({"guidance_rescale": 0.5}, {"height": 32, "width": 16}):
        assert not torch.equal(draw(pipe, **kwargs), draw(pipe, erased=[], **kwargs))
    with pytest.raises(ErasureNotInForce, match=r"\['neon'\] should be erased, but .* clip_skip=1 reads another one"):
        draw(pipe, clip_skip=1)


def test_the_progress_bar_can_be_silenced(pipe, capsys):
    pipe.set_progress_bar_config(disable=True)
    draw(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    assert "2/2" in capsys.readouterr().err


def test_from_single_file_is_the_plain_one(tmp_path):
    """A checkpoint in one file loads through our class as through the plain class, and erases."""
    source = random_pipeline()
    bank = SepMETrainer(source, replace(CLOSED, rank=3), guards=["watermark"]).erase(CONCEPTS[:2])
    source.save_pretrained(tmp_path / "folder")
    save_file(single_file_tensors(source), tmp_path / "model.safetensors", {"format": "pt"})
    pipe = SepMEPipeline.from_single_file(
        str(tmp_path / "model.safetensors"),
        config=str(tmp_path / "folder"),
        safety_checker=None,
        local_files_only=True,
    )
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe, SepMEPipeline)
    torch.testing.assert_close(draw(pipe), draw(source), rtol=0, atol=1e-4)
    pipe.load_sepme(bank)
    assert not torch.equal(draw(pipe, erased=["neon"]), draw(pipe))
