"""Pipelines of real base models' true architectures, with random weights and the built-in tokenizer.

For what does not depend on the weights' values: speed, memory, formats, and whether a base model is served at all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from tokenizers.models import WordLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sepme_diffusers import pocket
from sepme_diffusers.making.kinds import find_kind, kind_names
from sepme_diffusers.runtime.pipeline import SepMEPipeline, SepMEXLPipeline
from sepme_diffusers.text.lexicon import Lexicon

Module = TypeVar("Module", bound=nn.Module)

_NOISE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
_XL_BLOCKS = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def sd15_shape(dtype: torch.dtype = torch.float32, size: int = 64) -> SepMEPipeline:
    """Build Stable Diffusion 1.5: width 768, 512 pixels, predicts ε.

    Args:
        dtype: Of the weights.
        size: Of the latents it draws by default, an eighth of the picture's; the weights do not depend on it.
    """
    text = random_module(lambda: CLIPTextModel(_clip(768, 12, 12)), dtype)
    unet = random_module(lambda: UNet2DConditionModel(sample_size=size, cross_attention_dim=768), dtype)
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **_NOISE)
    return _pipeline(text, unet, scheduler, dtype)


def sd15_text_shape(dtype: torch.dtype = torch.float32) -> SepMEPipeline:
    """Build what a closed form needs of Stable Diffusion 1.5: its text encoder, with a vocabulary of real words."""
    return SepMEPipeline(
        vae=None, text_encoder=random_module(lambda: CLIPTextModel(_clip(768, 12, 12)), dtype),
        tokenizer=tokenizer_of_words(), unet=None, scheduler=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sd21_shape(dtype: torch.dtype = torch.float32, size: int = 96) -> SepMEPipeline:
    """Build Stable Diffusion 2.1: OpenCLIP's text encoder of width 1024, 768 pixels, predicts v; see `sd15_shape`."""
    text = random_module(lambda: CLIPTextModel(_clip(1024, 23, 16, hidden_act="gelu")), dtype)
    unet = random_module(
        lambda: UNet2DConditionModel(
            sample_size=size, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
            upcast_attention=True,
        ),
        dtype,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction", **_NOISE
    )
    return _pipeline(text, unet, scheduler, dtype)


def sdxl_shape(dtype: torch.dtype = torch.float32, size: int = 128) -> SepMEXLPipeline:
    """Build Stable Diffusion XL: two text encoders, width 2048, 1024 pixels, predicts ε; see `sd15_shape`."""
    pipe = SepMEXLPipeline(
        vae=_vae(8 * size, dtype, scaling_factor=0.13025),
        text_encoder=random_module(lambda: CLIPTextModel(_clip(768, 12, 12)), dtype),
        text_encoder_2=random_module(
            lambda: CLIPTextModelWithProjection(_clip(1280, 32, 20, hidden_act="gelu", projection_dim=1280)), dtype
        ),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=random_module(
            lambda: UNet2DConditionModel(sample_size=size, cross_attention_dim=2048, **_XL_BLOCKS), dtype
        ),
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **_NOISE),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tokenizer_of_words() -> CLIPTokenizer:
    """Make a tokenizer that has every word of kinds and regular prompts as a token: the built-in one spells most."""
    lexicon, kinds = Lexicon.everyday(), [find_kind(name) for name in kind_names()]
    texts = [*lexicon.captions, *chain(*lexicon.words.values())]
    for kind in kinds:
        texts += [template.prompt for template in kind.templates]
        texts += chain(*kind.words.values(), kind.known, *(known.names for known in kind.known.values()))
    tokenizer = _tokenizer()
    backend = tokenizer.backend_tokenizer
    split = [backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)) for text in texts]
    words = dict.fromkeys([tokenizer.bos_token, tokenizer.eos_token, *(word for text in split for word, _ in text)])
    backend.model = WordLevel({word: number for number, word in enumerate(words)}, unk_token=tokenizer.unk_token)
    return tokenizer


@torch.no_grad()
def random_module(build: Callable[[], Module], dtype: torch.dtype = torch.float32) -> Module:
    """Build a module with random weights, equal at every call, for inference; billions of numbers take seconds.

    Args:
        build: Makes the module; its own initialisation is left out.
        dtype: Of the weights.

    Raises:
        ValueError: If the module has a buffer whose values are not known.
    """
    module = _empty(build, dtype)
    draw = torch.Generator().manual_seed(0)
    # Fewer numbers than there are weights, used again from another place for each: their count is a prime, so that
    # the rows of a matrix differ.
    numbers = torch.rand(1_299_709, generator=draw) * 2 - 1
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            # Variance 1 / fan-in: signals neither grow nor die out on their way.
            shifted = numbers.roll(int(torch.randint(len(numbers), (), generator=draw)))
            scaled = ((3 / parameter[0].numel()) ** 0.5 * shifted).to(dtype)
            for part in parameter.view(-1).split(len(numbers)):
                part.copy_(scaled[: len(part)])
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, buffer in module.named_buffers():
        if not name.endswith("position_ids"):
            raise ValueError(f"{type(module).__name__} has a buffer {name!r} whose values are not known")
        buffer.copy_(torch.arange(buffer.shape[-1]))
    return module.eval()


def _empty(build: Callable[[], Module], dtype: torch.dtype) -> Module:
    """Make the module in its precision, without values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            module = build()
    finally:
        torch.set_default_dtype(before)
    return module.to_empty(device="cpu")


def _pipeline(
    text: nn.Module, unet: UNet2DConditionModel, scheduler: DDIMScheduler, dtype: torch.dtype
) -> SepMEPipeline:
    pipe = SepMEPipeline(
        vae=_vae(8 * unet.config.sample_size, dtype), text_encoder=text, tokenizer=_tokenizer(), unet=unet,
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _clip(width: int, layers: int, heads: int, **more: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=heads, bos_token_id=0, eos_token_id=1, pad_token_id=1, **more,
    )  # fmt: skip


def _vae(size: int, dtype: torch.dtype, **more: Any) -> AutoencoderKL:
    return random_module(
        lambda: AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=size,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **more,
        ),
        dtype,
    )  # fmt: skip


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(pocket.path(), subfolder="tokenizer", model_max_length=77)
