"""LeakageMeter: how far increments move prompts that they should leave alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.leakage import leakage, measured_leakage, output_norms
from sepme_diffusers.text.encoding import Encoded


class LeakageMeter:
    """Measures many increments on the same prompts; what does not depend on the increment is computed once.

    Args:
        encoded: Embeddings of prompts.
        weights: W_m (d_out, d) of the edited projections by module name.
    """

    def __init__(self, encoded: Encoded, weights: Mapping[str, Tensor]) -> None:
        self._encoded, self._weights = encoded, weights
        self._known_norms: dict[str, Tensor] = {}

    def largest(self, increment: Increment, prompts: Sequence[str]) -> float:
        """The largest leakage on one of the prompts; 0 for no prompts."""
        if not prompts:
            return 0.0
        return float(leakage(increment, self._encoded(prompts), self._weights, self._norms(prompts)).max())

    def metrics(self, increment: Increment, guards: Sequence[str], damped: Collection[str]) -> dict[str, Any]:
        """The metrics `leakage` and `leakage_of`, see `measured_leakage`."""
        return measured_leakage(increment, guards, self._encoded(guards), self._weights, damped, self._norms(guards))

    def _norms(self, prompts: Sequence[str]) -> Tensor:
        if new := [prompt for prompt in prompts if prompt not in self._known_norms]:
            self._known_norms.update(zip(new, output_norms(self._encoded(new), self._weights), strict=True))
        return torch.stack([self._known_norms[prompt] for prompt in prompts])
