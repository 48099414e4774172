"""Which Linear modules of a denoiser read the text embedding and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention

PROJECTIONS = ("to_k", "to_v")


def cross_attentions(denoiser: nn.Module) -> dict[str, Attention]:
    """Return the attentions that read the text embedding, by module name, in the order of the denoiser.

    Raises:
        ValueError: If the denoiser has none, so that nothing could be erased.
    """
    attentions = {
        name: module
        for name, module in plain(denoiser).named_modules()
        if _is_attention(module) and name.endswith("attn2") and module.is_cross_attention
    }
    if not attentions:
        raise ValueError(
            f"{type(denoiser).__name__} has no attn2.to_k / attn2.to_v that read the text embedding; "
            "SepME erases on UNets with text cross-attention"
        )
    return attentions


def _is_attention(module: nn.Module) -> TypeGuard[Attention]:
    """Tell an attention by its class's name: whoever reads a bank need not wait for the import of diffusers."""
    return any(kind.__name__ == "Attention" for kind in type(module).__mro__)


def text_projections(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the cross-attention key and value projections by module name, in the order of the denoiser.

    Names are those of the plain denoiser, whatever PEFT has wrapped around the modules.

    Raises:
        ValueError: If the denoiser has none.
    """
    return {
        f"{name}.{projection}": getattr(attention, projection)
        for name, attention in cross_attentions(denoiser).items()
        for projection in PROJECTIONS
    }


def linear_of(module: nn.Module) -> nn.Linear:
    """Return the Linear itself, whatever PEFT has wrapped around it."""
    return cast(nn.Linear, getattr(module, "base_layer", module))


def plain(denoiser: nn.Module) -> nn.Module:
    """Return the denoiser itself, whatever `torch.compile` has wrapped around it."""
    return getattr(denoiser, "_orig_mod", denoiser)


def is_compiled(denoiser: nn.Module) -> bool:
    """Return whether `torch.compile` has been asked to trace the denoiser or a part of it."""
    return plain(denoiser) is not denoiser or any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in denoiser.modules()
    )


def projection_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the weights W_m (d_out, d) of the text projections by module name, without any adapter on top.

    Quantised or offloaded weights are read through what the module computes, in float32 on the CPU.
    """
    return {name: linear_weight(module) for name, module in text_projections(denoiser).items()}


def projection_shapes(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_out, d) of the text projections by module name."""
    linears = {name: linear_of(module) for name, module in text_projections(denoiser).items()}
    return {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}


@torch.no_grad()
def apply_linear(linear: nn.Linear, rows: Tensor) -> Tensor:
    """Compute e W_mᵀ for rows e (n, d), past hooks and adapters, float32 on the CPU; also offloaded or quantised."""
    weight = linear.weight
    if _is_dense(linear):
        return (rows.to(weight.device) @ weight.float().T).cpu()
    dtype = weight.dtype if weight.is_floating_point() and weight.dtype.itemsize > 1 else torch.float32
    rows = torch.cat([rows, torch.zeros_like(rows[:1])]).to("cpu" if weight.is_meta else weight.device, dtype)
    outputs = linear.forward(rows).float().cpu()
    return outputs[:-1] - outputs[-1]


def _is_dense(linear: nn.Linear) -> bool:
    weight, shape = linear.weight, (linear.out_features, linear.in_features)
    # On "meta" because accelerate has offloaded it: its hook on forward knows where the numbers are.
    offloaded = weight.is_meta and hasattr(linear, "_hf_hook")
    return type(weight) in (nn.Parameter, Tensor) and weight.shape == shape and not offloaded


def linear_weight(module: nn.Module) -> Tensor:
    """Return the weight (d_out, d_in) of a Linear, without any adapter on top; see `projection_weights`."""
    linear = linear_of(module)
    return linear.weight.detach() if _is_dense(linear) else apply_linear(linear, torch.eye(linear.in_features)).T


def other_text_readers(denoiser: nn.Module) -> list[str]:
    """Modules beside attn2.to_k and attn2.to_v that read the text: per-module increments do not reach them."""
    denoiser = plain(denoiser)
    config = getattr(denoiser, "config", {})
    readers = [f"{key}={config[key]!r}" for key in ("encoder_hid_dim_type", "encoder_hid_dim") if config.get(key)]
    if config.get("addition_embed_type") in ("text", "text_image"):
        readers.append(f"addition_embed_type={config['addition_embed_type']!r}")
    for name, module in denoiser.named_modules():
        if not _is_attention(module):
            continue
        if getattr(module, "add_k_proj", None) is not None:
            readers.append(f"{name}.add_k_proj")
        elif module.is_cross_attention and not name.endswith("attn2"):
            readers.append(name)
        elif getattr(module, "norm_cross", None) is not None:
            readers.append(f"{name}.norm_cross")
    return readers
