"""What a baseline is: another eraser, whose weights take the place of the UNet's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Baseline:
    """An eraser to compare with.

    Args:
        name: What reports call it.
        reference: Where it is from.
        edit: Takes a pipeline, concepts, prompts to preserve, and settings; returns {parameter name: weight} of the
            UNet's changed parameters. It only reads the pipeline.
        choices: Settings to choose from where a protocol gives the baseline its best ones.
    """

    name: str
    reference: str
    edit: Callable[..., dict[str, Tensor]]
    choices: tuple[Mapping[str, Any], ...] = ({},)


@contextmanager
def replaced(unet: torch.nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other weights into a UNet while the block runs; then its own again, bit for bit."""
    parameters = {name: parameter for name, parameter in unet.named_parameters() if name in weights}
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        unet.load_state_dict(weights, strict=False)
        yield
    finally:
        unet.load_state_dict(own, strict=False)
