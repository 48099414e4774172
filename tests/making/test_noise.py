from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from sepme_diffusers import Concept, SepMEConfig, SepMETrainer
from sepme_diffusers.making.noise import Batch, NoisyPictures, Text
from sepme_diffusers.text.encoding import Encoded
from small import TRAIN, random_xl_pipeline

WOODCUT = Concept("woodcut", (("woodcut cat", "a cat"),))


class Exact:
    """A denoiser whose output is right."""

    dtype = torch.float32

    def __init__(self, output):
        self.sample = output

    def __call__(self, *_, **__):
        return self


def test_x0_are_the_original_models_pictures(pipe):
    """x_0 are what the pipeline draws for the concept's prompts, from the config's seed."""
    pictures = NoisyPictures(pipe, WOODCUT, TRAIN, Encoded(pipe))
    generator = torch.Generator().manual_seed(TRAIN.seed)
    drawn = pipe(
        ["woodcut cat"] * 2, num_inference_steps=2, guidance_scale=TRAIN.guidance_scale, generator=generator,
        output_type="latent",
    ).images  # fmt: skip
    assert torch.equal(pictures.latents, drawn)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_predicted_noise_follows_the_prediction_type(kind):
    """If the network's output is exact, the noise that was added comes back, whichever way it is parametrised."""
    alpha, x0, noise = torch.tensor([0.3, 0.9]), torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    root, rest = alpha.sqrt()[:, None, None, None], (1 - alpha).sqrt()[:, None, None, None]
    exact = {"epsilon": noise, "v_prediction": root * noise - rest * x0, "sample": x0}[kind]
    text = Text(torch.zeros(2, 16, 384), {})
    batch = Batch(root * x0 + rest * noise, torch.tensor([1, 2]), text, text, alpha, kind)
    torch.testing.assert_close(batch.predict_noise(Exact(exact), text), noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, EDMEulerScheduler])
def test_schedules_without_alphas_are_refused_before_anything_is_drawn(pipe, scheduler):
    pipe.scheduler = scheduler()
    with pytest.raises(ValueError, match=r"no schedule that training knows.*closed_form"):
        SepMETrainer(pipe, TRAIN).erase([WOODCUT])
    assert list(SepMETrainer(pipe, SepMEConfig.linear()).erase([WOODCUT])) == ["woodcut"]


def test_unknown_prediction_types_are_refused(pipe):
    pipe.scheduler = DDPMScheduler()
    pipe.scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ValueError, match="'score'"):
        SepMETrainer(pipe, TRAIN).erase([WOODCUT])


def test_pictures_of_ones_own_are_what_is_trained_on(pipe):
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    red, blue = (Image.new("RGB", (side, side), colour) for colour in ("red", "blue"))
    config = replace(TRAIN, n_images=1)
    latents = NoisyPictures(pipe, WOODCUT, config, Encoded(pipe), [red, blue]).latents
    with torch.no_grad():
        pixels = pipe.image_processor.preprocess(blue)
        expected = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    assert len(latents) == 2
    torch.testing.assert_close(latents[1:], expected)
    assert SepMETrainer(pipe, config).erase([WOODCUT], pictures={"woodcut": [red]})["woodcut"].metrics["steps"] > 0


def test_pictures_of_the_wrong_size_or_of_nobody_are_refused(pipe):
    picture = Image.new("RGB", (20, 8))
    with pytest.raises(ValueError, match=r"'woodcut' must be .* pixels.*0: \(20, 8\)"):
        SepMETrainer(pipe, TRAIN).erase([WOODCUT], pictures={"woodcut": [picture]})
    with pytest.raises(ValueError, match="\\['Monet'\\], which are not being erased"):
        SepMETrainer(pipe, TRAIN).erase([WOODCUT], pictures={"Monet": [picture]})


def test_sdxl_is_given_its_pooled_embedding_and_sizes():
    """What the denoiser reads beside the tokens in training is what the pipeline gives it at inference."""
    pipe = random_xl_pipeline()
    seen = []
    handle = pipe.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["added_cond_kwargs"]), with_kwargs=True
    )
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    pipe("woodcut cat", num_inference_steps=1, guidance_scale=1.0, output_type="latent", height=side, width=side)
    at_inference = seen[-1]
    pictures = NoisyPictures(pipe, WOODCUT, TRAIN, Encoded(pipe))
    batch = pictures.next()
    with torch.no_grad():
        batch.predict_noise(pipe.unet, batch.with_concept)
    handle.remove()
    for name in ("text_embeds", "time_ids"):
        torch.testing.assert_close(seen[-1][name][:1].float(), at_inference[name].float())


def test_batches_repeat_and_go_on_from_a_state(pipe):
    first, again = (NoisyPictures(pipe, WOODCUT, TRAIN, Encoded(pipe)) for _ in range(2))
    first.next()
    state = {name: value.clone() for name, value in first.state().items()}
    expected = first.next()
    again.restore(state)
    assert torch.equal(again.next().noisy, expected.noisy)
