"""Features of the built-in judge, for distances between pictures.

The networks that LPIPS and FID are named after know nothing of 64 x 64 emoji, so distances in these features compare
with others of this package and not with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from sepme_diffusers import pocket


@torch.no_grad()
def layers(images: Tensor) -> list[Tensor]:
    """Compute the outputs of the judge's stem and of its stages, each (n, channels, h, w).

    Args:
        images: (n, 3, 64, 64) in [0, 1].
    """
    judge = pocket.load_judge()
    outputs = [judge.stem(images * 2 - 1)]
    for stage in judge.stages:
        outputs.append(stage(outputs[-1]))
    return outputs


@torch.no_grad()
def pooled_features(pictures: Sequence[Image.Image]) -> Tensor:
    """Compute what the judge's heads read, texture and shape side by side, (n, 448)."""
    return torch.cat(pocket.load_judge().pooled(pocket.as_tensor(pictures)), dim=1)
