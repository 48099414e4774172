"""The text encoders of a pipeline, and the precision in which they work."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def text_encoders(pipe: Any) -> list[nn.Module]:
    """Return the text encoders of a pipeline, in the order of its components."""
    parts = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    return [part for part in parts if isinstance(part, nn.Module)]


def autocast_of(pipe: Any) -> list[tuple[str, bool, torch.dtype]]:
    """Return, for each kind of device that holds a text encoder, whether autocast is on there, and its precision."""
    kinds = {parameter.device.type for encoder in text_encoders(pipe) for parameter in encoder.parameters()}
    known = [kind for kind in sorted(kinds) if kind != "meta"]
    return [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in known]
