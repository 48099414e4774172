"""CLIP's zero-shot judge on a small CLIP, and the built-in judge, through the same code."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.pictures import generate
from sepme_diffusers.evaluation.preview.judges import find_judge


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP with random weights, in a folder."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = CLIPTokenizer.from_pretrained(pocket.path(), subfolder="tokenizer")
    shared = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**shared, **text, "pad_token_id": 1},
        vision_config={**shared, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def noise(seed: int, size: tuple[int, int] = (48, 64)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_clip_weighs_the_prompt_against_the_prompt_without(clip):
    judge = find_judge(str(clip))
    pictures = [noise(0), noise(1), noise(2)]
    there = judge(pictures, ["a neon cat"] * 3, ["a cat"] * 3)
    swapped = judge(pictures, ["a cat"] * 3, ["a neon cat"] * 3)
    assert all(0 < score < 1 for score in there)
    assert [sum(both) for both in zip(there, swapped, strict=True)] == pytest.approx([1, 1, 1], abs=1e-5)
    assert judge(pictures, ["a cat"] * 3, ["a cat"] * 3) == pytest.approx([0.5] * 3)
    assert len(set(there)) == 3


def test_a_picture_is_judged_by_its_own_texts(clip):
    judge = find_judge(str(clip))
    together = judge([noise(0), noise(1)], ["a neon cat", "woodcut"], ["a cat", ""])
    alone = [*judge([noise(0)], ["a neon cat"], ["a cat"]), *judge([noise(1)], ["woodcut"], [""])]
    assert together == pytest.approx(alone, abs=1e-5)


def test_the_built_in_judge_sees_what_the_prompt_names(pocket_pipe):
    judge = find_judge("pocket")
    pictures = generate(pocket_pipe, ["a neon cat", "a cat", "a cat"], seed=[3, 3, 3], steps=8)
    prompts = ["a glowing cat", "a neon cat", "a kitty"]
    neon, plain, cat = judge(pictures, prompts, ["a cat", "a cat", "a picture"])
    assert neon > 0.8
    assert plain < 0.2
    assert cat > 0.8


def test_the_built_in_judge_does_not_guess_what_it_never_learnt():
    assert math.isnan(find_judge("pocket")([noise(0, (64, 64))], ["a baroque thing"], ["a thing"])[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/judge", "there is no judge 'no/such/judge'; a judge is the folder or Hub id of a CLIP model"),
        (str(pocket.path() / "text_encoder"), "is a model of type 'clip_text_model'"),
        (str(pocket.path()), "there is no judge .*or 'pocket'"),
    ],
)
def test_what_is_no_judge_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        find_judge(name)
