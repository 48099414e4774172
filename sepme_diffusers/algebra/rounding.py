"""What rounding alone leaves of numbers that are zero in exact arithmetic."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Step = TypeVar("Step", float, Tensor)


def rounding_share(d: int, step: Step) -> Step:
    """Return how large |e · a| / (‖e‖ ‖a‖) may be by rounding alone: d numbers, rounded to a relative step."""
    return 3 * step / d**0.5
