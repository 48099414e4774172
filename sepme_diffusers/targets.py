"""Which Linear modules of a denoiser read the text embedding and nothing else."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import nn

PROJECTIONS = ("to_k", "to_v")


def cross_attentions(denoiser: nn.Module) -> dict[str, Attention]:
    """The attentions that read the text embedding, by module name, in the order of the denoiser.

    Raises:
        ValueError: If the denoiser has none, so that nothing could be erased.
    """
    found = {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, Attention) and name.endswith("attn2") and module.is_cross_attention
    }
    if not found:
        raise ValueError(
            f"{type(denoiser).__name__} has no attn2.to_k / attn2.to_v that read the text embedding; "
            "SepME erases on UNets with text cross-attention"
        )
    return found


def text_projections(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The cross-attention key and value projections by module name, in the order of the denoiser.

    Names are those of the plain denoiser, whatever PEFT has wrapped around the modules.

    Raises:
        ValueError: If the denoiser has none.
    """
    return {
        f"{name}.{projection}": getattr(attention, projection)
        for name, attention in cross_attentions(denoiser).items()
        for projection in PROJECTIONS
    }


def projection_weights(denoiser: nn.Module) -> dict[str, nn.Parameter]:
    """The weights W_m (d_out, d) of the text projections by module name, without any adapter on top."""
    modules = text_projections(denoiser)
    return {name: getattr(module, "base_layer", module).weight for name, module in modules.items()}
