import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from peft import LoraConfig

from sepme_diffusers.doors.linears import projection_weights, text_projections

SD15 = {"cross_attention_dim": 768}
SD21 = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
SDXL = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
}


@pytest.mark.parametrize(("settings", "modules", "rows"), [(SD15, 32, 24_960), (SD21, 32, 24_960), (SDXL, 140, None)])
def test_true_architectures(settings, modules, rows):
    """Stable Diffusion 1.x, 2.x and SDXL have the projections that the format counts on."""
    with torch.device("meta"):
        weights = projection_weights(UNet2DConditionModel(**settings))
    assert len(weights) == modules
    assert {weight.shape[1] for weight in weights.values()} == {settings["cross_attention_dim"]}
    assert rows in (None, sum(weight.shape[0] for weight in weights.values()))


def test_self_attention_is_left_out(pipe):
    assert all(".attn2.to_" in name for name in text_projections(pipe.unet))


def test_names_and_weights_are_the_plain_ones_under_a_lora(pipe):
    before = projection_weights(pipe.unet)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"]))
    after = projection_weights(pipe.unet)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_without_text_is_refused():
    model = UNet2DModel(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    with pytest.raises(ValueError, match="UNet2DModel has no attn2"):
        text_projections(model)
