"""Names at the true layouts, checked against diffusers' own converter from the original names."""

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from sepme_diffusers.interchange import original_names

SD1 = {"cross_attention_dim": 768}
XL = {
    "block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2, 10), "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "landmarks"),
    [
        (
            SD1,
            {
                "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight":
                    "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
                "down_blocks.2.downsamplers.0.conv.bias": "input_blocks.9.0.op.bias",
                "mid_block.resnets.1.conv1.weight": "middle_block.2.in_layers.2.weight",
                "up_blocks.0.upsamplers.0.conv.weight": "output_blocks.2.1.conv.weight",
                "up_blocks.1.upsamplers.0.conv.weight": "output_blocks.5.2.conv.weight",
                "up_blocks.3.attentions.2.proj_out.bias": "output_blocks.11.1.proj_out.bias",
                "time_embedding.linear_2.weight": "time_embed.2.weight",
            },
        ),
        (
            XL,
            {
                "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight":
                    "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
                "mid_block.attentions.0.transformer_blocks.9.attn2.to_v.weight":
                    "middle_block.1.transformer_blocks.9.attn2.to_v.weight",
                "add_embedding.linear_1.weight": "label_emb.0.0.weight",
            },
        ),
    ],
)  # fmt: skip
def test_unet_names_are_the_original_ones(layout, landmarks):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**layout)
    state = unet.state_dict()
    names = original_names.unet_names(state, unet.config.layers_per_block)
    assert {name: names[name] for name in landmarks} == landmarks
    original = {f"model.diffusion_model.{names[name]}": tensor for name, tensor in state.items()}
    assert len(original) == len(state)
    back = single_file_utils.convert_ldm_unet_checkpoint(original, unet.config)
    assert {name: tensor.shape for name, tensor in back.items()} == {k: t.shape for k, t in state.items()}


def test_vae_names_are_the_original_ones():
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
    state = vae.state_dict()
    original = original_names.vae(state, 4)
    assert original["decoder.mid.attn_1.proj_out.weight"].shape == (512, 512, 1, 1)
    assert {"encoder.down.2.downsample.conv.weight", "decoder.up.3.upsample.conv.weight"} <= original.keys()
    assert {"encoder.down.1.block.0.nin_shortcut.weight", "decoder.norm_out.bias"} <= original.keys()
    original = {f"first_stage_model.{name}": tensor for name, tensor in original.items()}
    back = single_file_utils.convert_ldm_vae_checkpoint(original, vae.config)
    assert {name: tensor.shape for name, tensor in back.items()} == {k: t.shape for k, t in state.items()}


def test_open_clip_names_go_there_and_back():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, eos_token_id=1,
    )  # fmt: skip
    model = CLIPTextModelWithProjection(config)
    state = model.state_dict()
    original = {f"cond_stage_model.model.{name}": tensor for name, tensor in original_names.open_clip(state).items()}
    assert original["cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"].shape == (48, 16)
    back = single_file_utils.convert_open_clip_checkpoint(model, original)
    back["text_projection.weight"] = original["cond_stage_model.model.text_projection"].T
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "name",
    ["position_net.linears.0.weight", "down_blocks.0.motion_modules.0.proj_in.weight",
     "up_blocks.0.downsamplers.0.conv.weight", "down_blocks.0.resnets.0.norm9.weight"],
)  # fmt: skip
def test_what_the_original_code_lacks_is_named(name):
    with pytest.raises(ValueError, match=f"UNet have no name in the original.*{name}"):
        original_names.unet_names(["conv_in.weight", name], 2)
