import pytest
import torch

from sepme_diffusers.runtime.call_arguments import CallArguments
from small import random_pipeline


def plain(self, prompt=None, num_images_per_prompt=1, prompt_embeds=None, ip_adapter_image=None, **kwargs):
    """Stand for the `__call__` of a plain pipeline."""


def arguments(*args, **kwargs):
    return CallArguments.of(plain, None, args, kwargs)


@pytest.mark.parametrize(
    ("given", "prompts", "each"),
    [
        (arguments("a cat"), 1, 1),
        (arguments(["a cat", "a dog"], 3), 2, 3),
        (arguments(prompt=["a cat"] * 3, num_images_per_prompt=2), 3, 2),
        (arguments(prompt_embeds=torch.zeros(4, 2, 2)), 4, 1),
        (arguments(), 0, 1),
        (arguments("a cat", num_images_per_prompt=None), 1, 1),
    ],
)
def test_prompts_and_pictures_are_counted_however_they_were_given(given, prompts, each):
    assert (given.prompts, given.pictures_per_prompt) == (prompts, each)


def test_what_the_caller_brings_is_named():
    assert arguments("a cat", prompt_embeds=None).embeddings == []
    assert arguments(prompt_embeds=torch.zeros(1, 2, 2)).embeddings == ["prompt_embeds"]
    assert arguments("a cat", ip_adapter_image=object()).image_prompts == ["ip_adapter_image"]


def test_deprecated_arguments_of_diffusers_pass_and_others_are_refused_with_the_nearest_name():
    arguments("a cat", callback=None, callback_steps=1)
    with pytest.raises(TypeError, match="'earsed'; did you mean 'erased'"):
        arguments("a cat", earsed=["neon"])
    with pytest.raises(TypeError, match="'promt'; did you mean 'prompt'"):
        arguments(promt="a cat")


def test_only_what_the_pipeline_can_encode_with_is_a_setting():
    pipe = random_pipeline()
    given = {"prompt": "a cat", "clip_skip": 1, "cross_attention_kwargs": {"scale": 0.5, "other": 1}}
    assert CallArguments(given).encode_settings(pipe) == {"clip_skip": 1, "lora_scale": 0.5}
    assert CallArguments({"prompt": "a cat"}).encode_settings(pipe) == {}
