"""A LoRA that someone trained on the very concept that is erased, on the projections that read the text."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sepme_diffusers import ErasureNotInForce, pocket
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.text.encoding import encode

STYLE = "woodcut"
LEARNT = [f"a {thing} in the style of {STYLE}" for thing in ("cat", "dog")]
ASKED = [f"a fox in the style of {STYLE}", f"a {STYLE} pig"]


def draw(pipe, prompts, **kwargs):
    """Latents, from the same noise for every batch of `ASKED`."""
    seeds = [torch.Generator().manual_seed(row % len(ASKED)) for row in range(len(prompts))]
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "generator": seeds, "output_type": "latent"}
    return pipe(prompts, **settings | kwargs).images


def trained_lora(pipe, steps=20):
    """A LoRA on to_k and to_v of cross-attention after some tens of steps on pictures of the style."""
    x0, e = draw(pipe, LEARNT), encode(pipe, LEARNT)
    unet = UNet2DConditionModel.from_pretrained(pocket.path(), subfolder="unet")
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=r".*attn2\.to_[kv]"))
    weights = [weight for name, weight in unet.named_parameters() if "lora_" in name]
    optimizer, noises = torch.optim.Adam(weights, lr=1e-2), torch.Generator().manual_seed(0)
    schedule = DDIMScheduler.from_config(pipe.scheduler.config)
    for _ in range(steps):
        noise = torch.randn(x0.shape, generator=noises)
        t = torch.randint(1000, (len(x0),), generator=noises)
        found = unet(schedule.add_noise(x0, noise, t), t, e).sample
        wanted = schedule.get_velocity(x0, noise, t) if schedule.config.prediction_type == "v_prediction" else noise
        loss = torch.nn.functional.mse_loss(found, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(unet).items()}


@pytest.fixture(scope="module")
def lora(pocket_pipe):
    return trained_lora(pocket_pipe)


@pytest.fixture
def pipe(pocket_pipe):
    return copy.deepcopy(pocket_pipe)


def shares(pipe, latents):
    """How much of the style the judge sees in each picture."""
    with torch.no_grad():
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    found, _ = pocket.classify(pipe.image_processor.postprocess(decoded))
    return found[:, pocket.style_classes.index(STYLE)]


def both_ways(pipe):
    """Latents of the same noise in one batch: with nothing erased, and with the style erased."""
    n = len(ASKED)
    return draw(pipe, ASKED * 2, erased=[[]] * n + [[STYLE]] * n).split(n)


def round_to_float32(unet):
    """Leave in the weights, which stay float64, what a fused checkpoint of float32 would hold."""
    for weight in unet.parameters():
        weight.data = weight.data.float().double()


def test_fused_and_unfused_it_gives_the_same_erased_picture_without_the_concept(pipe, lora):
    """Both read the edited text: they differ by what fusing rounds, as they do with nothing erased.

    What fusing rounds is weights. In float64 nothing else that rounds shows beside it, whatever the processor.
    """
    pipe.load_sepme(pocket.bank("styles").subset([STYLE]))
    pipe.to(torch.float64)
    before = both_ways(pipe)[0]
    pipe.load_lora_weights(lora, adapter_name="own")
    pipe.unet.double()
    unfused = both_ways(pipe)
    pipe.fuse_lora()
    round_to_float32(pipe.unet)
    fused = both_ways(pipe)
    for plain, erased in (unfused, fused):
        assert shares(pipe, plain).min() > 0.5
        assert shares(pipe, erased).max() < 0.2
    assert (unfused[0] - before).abs().mean() > 0.01  # the LoRA does something
    plain, erased = ((one - other).abs().mean() for one, other in zip(unfused, fused, strict=True))
    assert plain > 1e-11  # far above what float64 rounds
    assert erased <= 2 * plain
    assert erased < 1e-6


def test_per_module_increments_are_refused_while_it_is_fused(pipe, lora):
    """They are changes of the weights that they were made for."""
    bank = pocket.bank("styles").subset([STYLE])
    increment = bank[STYLE].increment.expand(projection_weights(pipe.unet))
    per_module = bank.with_entries([replace(bank[STYLE], increment=increment)])
    pipe.load_lora_weights(lora, adapter_name="own")
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="this UNet has other weights"):
        pipe.load_sepme(per_module)
    pipe.unfuse_lora()
    pipe.load_sepme(per_module)
    pipe.fuse_lora()
    with pytest.raises(ErasureNotInForce, match="the weights are no longer those"):
        draw(pipe, ASKED, erased=[STYLE])
