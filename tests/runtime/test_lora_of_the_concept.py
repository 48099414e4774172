"""A LoRA that someone trained on the very concept that is erased, on the projections that read the text."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from sepme_diffusers import ErasureNotInForce, pocket
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.text.encoding import encode

STYLE = "woodcut"
LEARNT = [f"a {thing} in the style of {STYLE}" for thing in ("cat", "dog")]
ASKED = [f"a fox in the style of {STYLE}", f"a {STYLE} pig"]


def draw(pipe, prompts, **kwargs):
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 1) * (len(prompts) // 2)]
    settings = {"num_inference_steps": 8, "guidance_scale": 4.0, "generator": seeds}
    return pipe(prompts, **settings | kwargs).images


def trained_lora(pipe, steps=20):
    """A LoRA on to_k and to_v of cross-attention after some tens of steps on pictures of the style."""
    x0, e = draw(pipe, LEARNT, erased=[], output_type="latent"), encode(pipe, LEARNT)
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


def shares(pictures):
    """How much of the style the judge sees in each picture."""
    found, _ = pocket.classify(StableDiffusionPipeline.numpy_to_pil(pictures))
    return found[:, pocket.style_classes.index(STYLE)]


def both_ways(pipe):
    """In one batch the pictures with nothing erased, and those with the style erased; values from 0 to 1."""
    pictures = draw(pipe, ASKED * 2, erased=[[], [], [STYLE], [STYLE]], output_type="np")
    return pictures[:2], pictures[2:]


def test_fused_and_unfused_it_gives_the_same_erased_picture_without_the_concept(pocket_pipe):
    """Both read the edited text: they differ by what fusing rounds, as they do with nothing erased."""
    pipe, bank = copy.deepcopy(pocket_pipe), pocket.bank("styles").subset([STYLE])
    entry = bank[STYLE]
    pipe.load_sepme(bank)
    before = both_ways(pipe)[0]
    pipe.load_lora_weights(trained_lora(pipe), adapter_name="own")
    unfused = both_ways(pipe)
    pipe.fuse_lora()
    fused = both_ways(pipe)
    for plain, erased in (unfused, fused):
        assert shares(plain).min() > 0.5
        assert shares(erased).max() < 0.2
    assert abs(unfused[0] - before).max() > 0.05  # the LoRA does something
    plain, erased = (abs(one - other).max() for one, other in zip(unfused, fused, strict=True))
    assert erased <= max(2 * plain, 1e-6)
    assert erased < 1e-4
    # Per-module increments are changes of the weights that they were made for.
    pipe.unload_sepme()
    original = projection_weights(pocket_pipe.unet)
    per_module = bank.with_entries([replace(entry, increment=entry.increment.expand(original))])
    with pytest.raises(ValueError, match="this UNet has other weights"):
        pipe.load_sepme(per_module)
    pipe.unfuse_lora()
    pipe.load_sepme(per_module)
    pipe.fuse_lora()
    with pytest.raises(ErasureNotInForce, match="the weights are no longer those"):
        draw(pipe, ASKED, erased=[STYLE])
