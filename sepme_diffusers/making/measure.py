"""LeakageMeter: how far increments move prompts that they should leave alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.leakage import leakage, leakage_metrics, output_norms
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
        """Return the largest leakage on one of the prompts, at any door; 0 for no prompts."""
        return float(self._leaks(increment, prompts).max()) if prompts else 0.0

    def metrics(self, increment: Increment, guards: Sequence[str], damped: Collection[str]) -> dict[str, Any]:
        """Return the metrics `leakage` and `leakage_of`, see `leakage_metrics`."""
        return leakage_metrics(guards, self._leaks(increment, guards), damped)

    def _leaks(self, increment: Increment, prompts: Sequence[str]) -> Tensor:
        """The leakage on each prompt, the largest of all doors, (n_prompts,)."""
        further = {door: self._encoded.at(door)(prompts) for door in increment.doors}
        return leakage(increment, self._encoded(prompts), self._weights, self._norms(prompts), further)

    def _norms(self, prompts: Sequence[str]) -> Tensor:
        if unknown := [prompt for prompt in prompts if prompt not in self._known_norms]:
            self._known_norms.update(zip(unknown, output_norms(self._encoded(unknown), self._weights), strict=True))
        return torch.stack([self._known_norms[prompt] for prompt in prompts])
