"""The built-in model keeps its promises: data, judge, pictures, banks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from sepme_diffusers import pocket
from sepme_diffusers.evaluation.measures.accuracy import judged
from sepme_diffusers.evaluation.pictures import generate
from sepme_diffusers.pocket import vocabulary as words
from sepme_diffusers.text.encoding import encode

FOLDER = Path(pocket.__file__).parent


def test_size_and_files():
    """What ships is safetensors, JSON and text, at most 25 MB."""
    files = [file for file in FOLDER.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert {file.suffix for file in files} <= {".py", ".json", ".safetensors", ".md"}


def test_vocabulary():
    assert len(pocket.styles) >= 10
    assert len(pocket.objects) >= 100
    assert sum(second is not None for second in words.STYLES.values()) >= 4
    assert sum(second is not None for second in words.OBJECTS.values()) >= 10
    held_out = [words.held_out_pair(s, o) for s in words.STYLES for o in words.OBJECTS]
    assert np.mean(held_out) == pytest.approx(0.1, abs=0.005)
    assert not set(words.HELD_OUT_TEMPLATES) & set(words.PAIR_TEMPLATES)


def test_every_name_is_one_token(pocket_pipe):
    names = [name for table in (words.STYLES, words.OBJECTS) for pair in table.items() for name in pair if name]
    assert all(len(pocket_pipe.tokenizer(name).input_ids) == 3 for name in names)
    assert pocket_pipe.tokenizer.model_max_length == 16
    assert encode(pocket_pipe, [""]).shape == (1, 16, 384)


def test_it_is_a_plain_stable_diffusion_that_others_can_load():
    pipe = StableDiffusionPipeline.from_pretrained(pocket.path())
    assert {type(part).__name__ for part in pipe.components.values() if part is not None} == {
        "UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel", "CLIPTokenizer", "DDIMScheduler",
    }  # fmt: skip
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}


def test_it_draws_what_it_is_asked(pocket_pipe):
    """A coarse net under the model's bars, which examples/pocket/evaluate.py measures on many more pictures."""
    pairs = [(style, pocket.objects[(9 * i) % 110]) for i, style in enumerate(pocket.styles)]
    prompts = [words.HELD_OUT_TEMPLATES[0].format(style=style, object=object_) for style, object_ in pairs]
    style, object_ = judged(generate(pocket_pipe, prompts, seed=77, steps=10), *zip(*pairs, strict=True))
    assert style >= 90
    assert object_ >= 75


def test_the_variant_is_another_model_with_the_same_reach(pocket_pipe):
    base, variant = pocket_pipe.unet, UNet2DConditionModel.from_pretrained(pocket.path("variant"))
    pairs = [(style, pocket.objects[(7 * i) % 110]) for i, style in enumerate(pocket.styles)]
    prompts = [f"{style} {object_}" for style, object_ in pairs]
    pocket_pipe.unet = variant
    try:
        pictures = generate(pocket_pipe, prompts, seed=5, steps=10)
    finally:
        pocket_pipe.unet = base
    style, object_ = judged(pictures, *zip(*pairs, strict=True))
    assert style >= 80
    assert object_ >= 60
    assert pictures[:1] != generate(pocket_pipe, prompts[:1], seed=5, steps=10)


def test_the_judge_gives_probabilities_and_refuses_other_sizes():
    style, object_ = pocket.classify([Image.new("RGB", (64, 64), "white")] * 3)
    assert style.shape == (3, 13)
    assert object_.shape == (3, 110)
    torch.testing.assert_close(style.sum(1), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\)"):
        pocket.classify([Image.new("RGB", (32, 32))])


@pytest.mark.parametrize("name", ["styles", "objects"])
def test_shipped_banks_hold_their_guards(pocket_pipe, name):
    """Of exact guards every shipped increment reads rounding alone, of damped ones too little to open its gate."""
    bank = pocket.bank(name)
    assert len(bank) == {"styles": 10, "objects": 100}[name]
    prompts = sorted({prompt for entry in bank.values() for prompt in entry.guards})
    embedded = dict(zip(prompts, encode(pocket_pipe, prompts), strict=True))
    for entry in bank.values():
        gate = entry.increment.gate
        for guards, most in ((entry.guards.exact, 1e-4 * gate), (entry.guards.damped, gate)):
            kept = [prompt for prompt in guards if prompt not in entry.metrics.get("leakage_of", {})]
            if kept:
                read = entry.increment.reading(torch.stack([embedded[prompt] for prompt in kept]))
                assert read.max() < most, entry.concept.name
    leaking = sum(len(entry.metrics.get("leakage_of", {})) for entry in bank.values())
    assert leaking == 0


def test_the_styles_bank_guards_the_papers_way():
    bank = pocket.bank("styles")
    assert set(bank) == set(words.BANKED_STYLES)
    for name, entry in bank.items():
        assert set(entry.guards) == {"", "watermark", *words.BANKED_STYLES} - {name}


@pytest.mark.parametrize("call", [pocket.path, pocket.bank])
def test_unknown_names_are_refused(call):
    with pytest.raises(ValueError, match="not 'big'"):
        call("big")
