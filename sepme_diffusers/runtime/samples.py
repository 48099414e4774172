"""Samples: some numbers of tensors, cheap enough to be compared in every call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Numbers of each tensor, at least.
_NUMBERS = 64


@torch.no_grad()
def samples(tensors: Iterable[Tensor]) -> list[bytes]:
    """Return some numbers of every tensor, evenly spaced, which another checkpoint or a fused adapter changes.

    They are put together before they are transferred, so that a GPU is waited for once. Tensors on "meta" are left
    out.

    Args:
        tensors: Of any shape, device and precision, those of quantisers too.
    """
    kinds: dict[Any, list[Tensor]] = {}
    for tensor in (part for whole in tensors for part in _parts(whole.detach())):
        if tensor.numel() and not tensor.is_meta:
            chosen = tensor.reshape(-1)[:: max(1, tensor.numel() // _NUMBERS)]
            kinds.setdefault((tensor.device, tensor.dtype), []).append(chosen)
    return [torch.cat(chosen).float().cpu().numpy().tobytes() for chosen in kinds.values()]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: those of quantisers wrap several."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]
