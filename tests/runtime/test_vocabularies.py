import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline

from sepme_diffusers import ErasureNotInForce, attach
from sepme_diffusers.runtime.vocabularies import Vocabularies
from small import latents


def test_an_added_or_an_overwritten_token_is_seen(pipe):
    before = Vocabularies.of(pipe)
    before.refuse_others(pipe)
    # As load_textual_inversion writes: through .data, which bumps no version.
    pipe.text_encoder.get_input_embeddings().weight.data[3] += 1e-3
    with pytest.raises(ErasureNotInForce, match="vocabulary of \\['text_encoder'\\] has changed"):
        before.refuse_others(pipe)
    before = Vocabularies.of(pipe)
    pipe.load_textual_inversion({"<mine>": torch.randn(pipe.text_encoder.config.hidden_size)}, token="<mine>")
    with pytest.raises(ErasureNotInForce, match="text_encoder"):
        before.refuse_others(pipe)


def test_a_strict_host_is_obeyed_by_every_pipeline_that_shares_the_denoiser(pipe, text_bank):
    """The vocabularies are those of the moment of loading, whichever pipeline is called."""
    pipe.load_sepme(text_bank, strict=True)
    other = attach(StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False))
    other.set_progress_bar_config(disable=True)
    pipe.text_encoder.get_input_embeddings().weight.data[3] += 1e-3
    picture = {"image": torch.zeros(1, 3, 8, 8), "num_inference_steps": 2, "output_type": "latent"}
    other("a cat", erased=[], **picture)
    for call in (lambda: other("a cat", erased=["neon"], **picture), lambda: latents(pipe, "a cat", erased=["neon"])):
        with pytest.raises(ErasureNotInForce, match="vocabulary") as error:
            call()
        assert error.value.concepts == ("neon",)
