"""Solver: what turns plans into increments, with what it is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.loop import Step
from sepme_diffusers.making.noise import NoisyPictures
from sepme_diffusers.making.plan import Needs, Plan
from sepme_diffusers.making.state import TrainingState
from sepme_diffusers.text.concept import Concept


@dataclass(frozen=True)
class Task:
    """Concepts that are solved for together, and what a solver may use for it.

    Args:
        plans: One per concept.
        pipe: The original model, which a solver leaves as it was.
        weights: W_m (d_out, d) of its text projections by module name.
        config: The settings.
        pictures: Makes the noisy pictures of a concept; the original model may have to draw them first.
        on_step: Called after every training step.
        state: Where training is written down, or None.
    """

    plans: Sequence[Plan]
    pipe: Any
    weights: Mapping[str, Tensor]
    config: SepMEConfig
    pictures: Callable[[Concept], NoisyPictures]
    on_step: Callable[[Step], None] | None = None
    state: TrainingState | None = None


@dataclass(frozen=True)
class Solution:
    """An increment, and the metrics that its solver reports."""

    increment: Increment
    metrics: Mapping[str, Any]


class Solver(Needs, Protocol):
    """A way to find increments.

    Attributes:
        name: The name in `SepMEConfig.solver`.
        reference: Where the method is described.
    """

    name: str
    reference: str

    def solve(self, task: Task) -> list[Solution]:
        """Find one increment per plan, in the plans' order."""
        ...
