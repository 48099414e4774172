"""LeakageMeter: how far increments move prompts that they should leave alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.leakage import leakage, measured_leakage, output_norms
from sepme_diffusers.text.concept import BLANK
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
        self._known_doors: dict[str, LeakageMeter] = {}

    def largest(self, increment: Increment, prompts: Sequence[str]) -> float:
        """Return the largest leakage on one of the prompts, at any door; 0 for no prompts."""
        if not prompts:
            return 0.0
        own = float(leakage(increment, self._encoded(prompts), self._weights, self._norms(prompts)).max())
        return max([own, *(self._at(door).largest(there, prompts) for door, there in increment.doors.items())])

    def metrics(self, increment: Increment, guards: Sequence[str], damped: Collection[str]) -> dict[str, Any]:
        """Return `leakage` and `leakage_of`, see `measured_leakage`; at several doors the largest of each."""
        own = measured_leakage(increment, guards, self._encoded(guards), self._weights, damped, self._norms(guards))
        doors = [self._at(door).metrics(there, guards, damped) for door, there in increment.doors.items()]
        if not doors:
            return own
        leaks = [metrics.get("leakage_of", {}) for metrics in (own, *doors)]
        moved = {
            guard: max(leak.get(guard, 0.0) for leak in leaks)
            for guard in guards
            if any(guard in leak for leak in leaks)
        }
        largest = {"leakage": max(metrics["leakage"] for metrics in (own, *doors))}
        return largest | ({"leakage_of": moved} if moved else {})

    def _at(self, door: str) -> LeakageMeter:
        """The meter for a further door: what leaks there is a share of the embedding itself."""
        if door not in self._known_doors:
            encoded = self._encoded.at(door)
            self._known_doors[door] = LeakageMeter(
                encoded, {door: torch.eye(encoded([BLANK]).shape[-1]).to(encoded.device)}
            )
        return self._known_doors[door]

    def _norms(self, prompts: Sequence[str]) -> Tensor:
        if new := [prompt for prompt in prompts if prompt not in self._known_norms]:
            self._known_norms.update(zip(new, output_norms(self._encoded(new), self._weights), strict=True))
        return torch.stack([self._known_norms[prompt] for prompt in prompts])
