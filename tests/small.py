"""Real pipelines at small size with random weights, for theorems; and what is erased on them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sepme_diffusers import Concept, ConceptBank, SepMEConfig, SepMEPipeline, SepMEXLPipeline, pocket

WIDTH, TOKENS = 384, 16


def random_pipeline(seed: int = 0, text_seed: int = 0) -> SepMEPipeline:
    """An untrained Stable Diffusion with the built-in model's tokenizer; equal for equal seeds."""
    tokenizer = CLIPTokenizer.from_pretrained(pocket.path(), subfolder="tokenizer")
    torch.manual_seed(text_seed)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    unet = random_unet(seed)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    pipe = SepMEPipeline(
        vae=vae.eval(), text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_unet(seed: int = 0, width: int = WIDTH) -> UNet2DConditionModel:
    """An untrained UNet that looks at the text; equal for equal seeds."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=2, norm_num_groups=4,
        cross_attention_dim=width, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    # Untrained attention is nearly blind to the text; make it look.
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "attn2" in name:
                parameter.mul_(3)
    return unet.eval()


def random_xl_pipeline() -> SepMEXLPipeline:
    """An untrained SDXL whose text encoders differ in width, by which single-file readers tell them apart."""
    tokenizer = CLIPTokenizer.from_pretrained(pocket.path(), subfolder="tokenizer")
    torch.manual_seed(0)
    first, second = (
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=37, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=16, projection_dim=width, bos_token_id=0, eos_token_id=1,
            pad_token_id=1,
        )
        for width in (32, 64)
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=(2, 4), norm_num_groups=4,
        cross_attention_dim=96, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=(1, 2),
        projection_class_embeddings_input_dim=6 * 8 + 64,
    )  # fmt: skip
    pipe = SepMEXLPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8, 16), norm_num_groups=4, sample_size=16,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        ).eval(),
        text_encoder=CLIPTextModel(first).eval(), text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet.eval(),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), add_watermarker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


CONCEPTS = [
    Concept("neon", (("a cat in the style of neon", "a cat"), ("neon dog", "a dog"))),
    Concept("cat", (("a cat", ""), ("a picture of a cat", ""))),
    Concept("pencil", (("a pencil picture of a fox", "a picture of a fox"),)),
]
CLOSED = SepMEConfig.linear(rank=6, soft_guard_weight=0.0)
TRAIN = SepMEConfig.linear(
    solver="train", rank=8, beta=0.02, min_steps=4, max_steps=6, batch_size=2, n_images=2, image_steps=2
)


def wide(bank: ConceptBank, copies: int = 40) -> ConceptBank:
    """A bank of more ranks than the embedding is wide, so that each set gathers increments of its own."""
    entries = [entry.renamed(f"{name} {number}") for name, entry in bank.items() for number in range(copies)]
    return bank.with_entries(entries)


def latents(pipe: SepMEPipeline, prompt: str | list[str], seed: int = 0, **kwargs: object) -> torch.Tensor:
    """Latents of a short run from a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    made = pipe(prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator, output_type="latent", **kwargs)
    return made.images


PROMPTS = ["neon woodcut cat", "a pencil picture of a dog"]


def draw(pipe: SepMEPipeline, **kwargs: object) -> torch.Tensor:
    """Latents of two steps without guidance, which would amplify rounding with everything else."""
    settings = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    return pipe(PROMPTS, generator=torch.Generator().manual_seed(0), **settings | kwargs).images
