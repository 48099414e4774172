"""The base model that a command works on, with erasures attached."""

from __future__ import annotations

import warnings
from typing import Any

from sepme_diffusers.cli.export import Precision


def load_base(base: str, device: str | None, dtype: Precision | None) -> Any:
    """Load the base on a device, the GPU where there is one; there in half precision, unless one is asked for."""
    import torch
    from diffusers import DiffusionPipeline

    from sepme_diffusers import attach

    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = str(found or "cpu")
    precision = dtype or (Precision.FLOAT32 if device == "cpu" else Precision.FLOAT16)
    with warnings.catch_warnings():
        # Newer versions of diffusers call it dtype, which the oldest one that is supported does not know.
        warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)
        pipe = attach(DiffusionPipeline.from_pretrained(base, torch_dtype=getattr(torch, precision.value)))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
