"""What rounding alone leaves of numbers that are zero in exact arithmetic."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Step = TypeVar("Step", float, Tensor)


def coarseness(dtype: torch.dtype) -> float:
    """Return the relative rounding step of a type of numbers where that is coarser than float32's, else 0."""
    step = torch.finfo(dtype).eps
    return step if step > torch.finfo(torch.float32).eps else 0.0


def rounding_share(d: int, step: Step) -> Step:
    """Return how large |e · a| / (‖e‖ ‖a‖) may be by rounding alone: d numbers, rounded to a relative step."""
    return 3 * step / d**0.5
