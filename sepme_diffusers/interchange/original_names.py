"""Stable Diffusion's original key names, which single-file checkpoints and SDXL LoRAs use. Tensors in, tensors out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_UNET_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_BLOCK = re.compile(r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)")
_VAE_MID_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(?:(?:down|up)_blocks\.(\d+)|mid_block)\.(\w+)\.(\d+)\.(.+)")
_OPEN_CLIP_STACKED = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(\w+)")
_OPEN_CLIP_OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_names(names: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Find the original name of each module or parameter of a diffusers UNet.

    Args:
        names: All names at once: where an upsampler stands depends on whether its block has attentions.
        layers_per_block: Of the UNet's config.

    Raises:
        ValueError: If one has no name in the original code; the message lists them.

    Example:
        >>> unet_names(["down_blocks.1.attentions.0.proj_in"], 2)
        {'down_blocks.1.attentions.0.proj_in': 'input_blocks.4.1.proj_in'}
    """
    names = list(names)
    attended = {match[1] for name in names if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", name))}
    return _complete({name: _unet_name(name, layers_per_block + 1, attended) for name in names}, "UNet")


def _unet_name(name: str, stride: int, attended: set[str]) -> str | None:
    match = _UNET_BLOCK.fullmatch(name)
    if match is None:
        return _renamed(name, _UNET_OUTSIDE)
    side, block, kind, layer = match[1], match[2], match[3], int(match[4])
    if kind not in ("resnets", "attentions"):
        return _resampler(side, block, kind, match[5], stride, attended)
    rest = _renamed(match[5], _UNET_RESNET) if kind == "resnets" else match[5]
    if side is None:
        return rest and f"middle_block.{2 * layer + (kind == 'attentions')}.{rest}"
    place = int(block) * stride + layer
    side = f"input_blocks.{1 + place}" if side == "down" else f"output_blocks.{place}"
    return rest and f"{side}.{int(kind == 'attentions')}.{rest}"


def _resampler(side: str | None, block: str, kind: str, rest: str, stride: int, attended: set[str]) -> str | None:
    """Resamplers close their block: the last of its places on the way down, the last module of it on the way up."""
    place = (int(block or 0) + 1) * stride
    if (side, kind) == ("down", "downsamplers"):
        return f"input_blocks.{place}.0.{rest.replace('conv', 'op', 1)}"
    if (side, kind) == ("up", "upsamplers"):
        return f"output_blocks.{place - 1}.{2 if block in attended else 1}.{rest}"
    return None


def vae(state: Mapping[str, Tensor], n_blocks: int) -> dict[str, Tensor]:
    """Rename a diffusers AutoencoderKL's tensors to their original names.

    Raises:
        ValueError: If one has no name in the original code; the message lists them.
    """
    names = _complete({name: _vae_name(name, n_blocks) for name in state}, "VAE")
    # The original attention is a 1 x 1 convolution.
    convolutions = {f".attn_1.{part}.weight" for part in ("q", "k", "v", "proj_out")}
    return {
        new: state[old][:, :, None, None] if any(new.endswith(part) for part in convolutions) else state[old]
        for old, new in names.items()
    }


def _vae_name(name: str, n_blocks: int) -> str | None:
    match = _VAE_BLOCK.fullmatch(name)
    if match is None:
        outside = name.replace("conv_norm_out", "norm_out")
        return outside if re.fullmatch(r"((en|de)coder\.\w+|(post_)?quant_conv)\.(weight|bias)", outside) else None
    side, block, kind, layer, rest = match[1], match[2], match[3], int(match[4]), match[5]
    if block is None and kind == "attentions":
        rest = _renamed(rest, _VAE_MID_ATTENTION)
        return rest and f"{side}.mid.attn_{layer + 1}.{rest}"
    if kind == "resnets":
        rest = rest.replace("conv_shortcut", "nin_shortcut")
    if block is None:
        return f"{side}.mid.block_{layer + 1}.{rest}"
    place = f"{side}.down.{block}" if side == "encoder" else f"{side}.up.{n_blocks - 1 - int(block)}"
    parts = {"resnets": f"block.{layer}", "downsamplers": "downsample", "upsamplers": "upsample"}
    return f"{place}.{parts[kind]}.{rest}" if kind in parts else None


def clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIPTextModel's tensors to their original names."""
    # transformers has dropped the wrapper that the original names keep.
    outside = ("text_model.", "text_projection.")
    return {name if name.startswith(outside) else f"text_model.{name}": tensor for name, tensor in state.items()}


def open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a CLIPTextModel's tensors to OpenCLIP's names, which SD 2.x and SDXL's second text encoder use.

    Raises:
        ValueError: If one has no name there; the message lists them.
    """
    tensors = clip(state)
    stacked = {name: match for name in tensors if (match := _OPEN_CLIP_STACKED.fullmatch(name))}
    names = _complete({name: _open_clip_name(name) for name in tensors if name not in stacked}, "text encoder")
    renamed = {new: tensors[old] for old, new in names.items()}
    if "text_projection" in renamed:
        renamed["text_projection"] = renamed["text_projection"].T
    for name in sorted(name for name in stacked if ".q_proj." in name):
        layer, kind = stacked[name].groups()
        parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
        renamed[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return renamed


def _open_clip_name(name: str) -> str | None:
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return _OPEN_CLIP_OUTSIDE.get(name)
    rest = _renamed(match[2], _OPEN_CLIP_LAYER)
    return rest and f"transformer.resblocks.{match[1]}.{rest}"


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """Rename the module in a name, None if the table does not have it; the parameter's own name stays."""
    for old, new in table.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return None


def _complete(names: Mapping[str, str | None], what: str) -> dict[str, str]:
    if unknown := [name for name, new in names.items() if new is None]:
        raise ValueError(f"parts of the {what} have no name in the original Stable Diffusion code: {unknown}")
    return {name: new for name, new in names.items() if new is not None}
