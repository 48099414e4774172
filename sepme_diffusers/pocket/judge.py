"""The judge: a small network that tells the style and the object of a 64 x 64 picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.skip = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first_norm(self.first(x)))
        return F.relu(self.second_norm(self.second(hidden)) + self.skip(x))


class Judge(nn.Module):
    """A residual network with one head for the style and one for the object.

    Args:
        n_styles: Style classes, the plain look included.
        n_objects: Object classes.
        widths: Channels of the stages; each halves the picture.
    """

    def __init__(self, n_styles: int, n_objects: int, widths: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1)
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.stages = nn.Sequential(*(_Block(width_in, width, 2) for width_in, width in pairs))
        self.style_head = nn.Linear(2 * widths[-2], n_styles)
        self.object_head = nn.Linear(2 * widths[-1], n_objects)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute style logits (n, n_styles) and object logits (n, n_objects) of images (n, 3, 64, 64) in [0, 1]."""
        texture, shape = self.pooled(images)
        return self.style_head(texture), self.object_head(shape)

    def pooled(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute what the two heads read: texture (n, 2 * widths[-2]) and shape (n, 2 * widths[-1]) features."""
        texture = self.stages[:-1](self.stem(images * 2 - 1))
        return _means_and_maxima(texture), _means_and_maxima(self.stages[-1](texture))


def _means_and_maxima(maps: Tensor) -> Tensor:
    """Pool feature maps (n, d, height, width) to (n, 2 d)."""
    return torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], dim=1)
