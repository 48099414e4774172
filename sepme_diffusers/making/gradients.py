"""Gradients through a denoiser whose own weights are left out of them, in half precision too."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# The loss is scaled so that the denoiser's output gets gradients of this size. That is the middle of what float16
# holds, on a logarithmic scale: they may grow or shrink a thousandfold on their way back through the denoiser.
_SIZE_AT_OUTPUT = 16.0
_BACK_OFF = 64.0
_LEAST_AT_OUTPUT = 1e-3


@contextmanager
def frozen(denoiser: nn.Module) -> Iterator[None]:
    """While the block runs, no parameter of the denoiser requires a gradient: nothing is kept in memory for them."""
    trainable = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def gradients(
    loss: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype, size_at_output: float
) -> list[Tensor | None]:
    """Differentiate a loss of a denoiser's output; None for a parameter that it does not depend on.

    A loss is a mean over many numbers, so its gradient at the output is smaller than float16 can hold. For such a
    denoiser the loss is multiplied by a power of two, the gradients are divided by it, and where one of them
    overflows a smaller power is taken.

    Args:
        loss: A scalar in float32.
        parameters: What to differentiate with respect to, float32.
        dtype: The type that the denoiser computes in.
        size_at_output: The largest derivative of the loss with respect to a number of the denoiser's output.

    Raises:
        FloatingPointError: If no power avoids both overflow and underflow.
    """
    if dtype != torch.float16 or not size_at_output > 0:
        return list(torch.autograd.grad(loss, parameters, allow_unused=True))
    scale = 2.0 ** round(math.log2(_SIZE_AT_OUTPUT / size_at_output))
    while scale * size_at_output > _LEAST_AT_OUTPUT:
        scaled = torch.autograd.grad(scale * loss, parameters, allow_unused=True, retain_graph=True)
        if all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in scaled):
            return [None if gradient is None else gradient / scale for gradient in scaled]
        scale /= _BACK_OFF
    raise FloatingPointError(
        "the denoiser's gradients overflow float16 however the loss is scaled; train on the pipeline in float32 or "
        "bfloat16, or use solver='closed_form', which takes no gradients"
    )
