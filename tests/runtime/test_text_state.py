"""What a call compares of a text encoder with the call before."""

import pytest
import torch
from peft import LoraConfig

from sepme_diffusers.runtime.text_check import _encoder_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_parameter_is_looked_at(pipe, dtype):
    encoder = pipe.text_encoder.to(dtype)
    for name, parameter in encoder.named_parameters():
        before = _encoder_state(encoder)
        assert _encoder_state(encoder) == before
        parameter.data = parameter + 1  # no version
        assert _encoder_state(encoder) != before, name


def test_adapters_are_looked_at(pipe):
    encoder = pipe.text_encoder
    plain = _encoder_state(encoder)
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), "first")
    with_adapter = _encoder_state(encoder)
    encoder.disable_adapters()
    without = _encoder_state(encoder)
    encoder.enable_adapters()
    assert plain != with_adapter != without
    assert _encoder_state(encoder) == with_adapter


def test_parameters_of_quantisers_are_looked_at(pipe):
    """They are several tensors in one, most of whose operations are not there."""
    quantization = pytest.importorskip("torchao.quantization")
    encoder = pipe.text_encoder
    before = _encoder_state(encoder)
    quantization.quantize_(encoder, quantization.Int8WeightOnlyConfig())
    quantised = _encoder_state(encoder)
    assert quantised != before
    assert _encoder_state(encoder) == quantised
