"""Guards at twelve layers: made in one precision and used in another, on quantised and adapted text encoders."""

import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sepme_diffusers import ErasureNotInForce, SepMEConfig, SepMEPipeline, SepMETrainer, pocket
from small import CONCEPTS, latents, random_pipeline, random_unet

GUARDED = ("", "watermark", "neon")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def whole():
    """Stable Diffusion 1.5's text encoder, twelve layers of width 768 and 77 tokens, before a small UNet."""
    pipe = random_pipeline()
    tokenizer = CLIPTokenizer.from_pretrained(pocket.path(), subfolder="tokenizer", model_max_length=77)
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    pipe.register_modules(tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval(), unet=random_unet(width=768))
    return pipe


def in_precision(whole, dtype):
    """A pipeline of its own, with copies of what computes."""
    parts = {name: copy.deepcopy(getattr(whole, name)).to(dtype) for name in ("text_encoder", "unet")}
    kept = {name: whole.components[name] for name in ("vae", "tokenizer", "scheduler")}
    pipe = SepMEPipeline(**parts, **kept, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def bank_of(whole):
    """Makes the bank in a precision, once."""
    made = {}

    def make(name):
        if name not in made:
            trainer = SepMETrainer(in_precision(whole, DTYPES[name]), SepMEConfig.linear(rank=4), ["watermark"])
            made[name] = trainer.erase(CONCEPTS[:2])
        return made[name]

    return make


def holds(pipe, bank):
    """Load the bank and erase all of it: no guard moves by a bit, and what is erased does move."""
    before = {prompt: latents(pipe, prompt) for prompt in (*GUARDED, CONCEPTS[1].prompts[0])}
    pipe.load_sepme(bank)
    after = {prompt: latents(pipe, prompt, erased=["cat"]) for prompt in before}
    *guarded, own = (torch.equal(after[prompt], before[prompt]) for prompt in before)
    return all(guarded) and not own


@pytest.mark.parametrize(
    ("made", "used"),
    [
        pytest.param(made, used, marks=[] if made == used == "float32" else [pytest.mark.slow])
        for made in DTYPES
        for used in DTYPES
    ],
)
def test_guards_of_a_bank_made_in_one_precision_hold_in_another(whole, bank_of, made, used):
    assert holds(in_precision(whole, DTYPES[used]), bank_of(made))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_bank_that_was_made_in_half_precision_holds_in_full(pipe, dtype):
    bank = SepMETrainer(random_pipeline().to(dtype), SepMEConfig.linear(rank=4), ["watermark"]).erase(CONCEPTS[:2])
    assert holds(pipe, bank)


def test_guards_hold_on_a_quantised_text_encoder(whole, bank_of):
    """Eight bits for the weights and the readings of every layer."""
    pipe = in_precision(whole, torch.float32)
    pipe.text_encoder = torch.ao.quantization.quantize_dynamic(pipe.text_encoder, {nn.Linear}, dtype=torch.qint8)
    assert holds(pipe, bank_of("float32"))


@pytest.mark.parametrize(("scale", "refused"), [(1e-4, False), (0.3, True)])
def test_an_adapter_on_the_text_encoder_is_allowed_while_guards_hold(whole, bank_of, scale, refused):
    """A little is taken as rounding is; more, and guards would move: then nothing is drawn."""
    pipe, bank = in_precision(whole, torch.float32), bank_of("float32")
    torch.manual_seed(1)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for name, parameter in pipe.text_encoder.named_parameters():
        if "lora_B" in name:
            parameter.data *= scale
    if not refused:
        assert holds(pipe, bank)
        return
    pipe.text_encoder.disable_adapters()
    pipe.load_sepme(bank)
    pipe.set_erased(["cat"])
    latents(pipe, "a cat")
    pipe.text_encoder.enable_adapters()
    with pytest.raises(ErasureNotInForce, match="text encoder has changed"):
        latents(pipe, "a cat")
