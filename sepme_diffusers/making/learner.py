"""Learner: one concept's increment while it is learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.algebra.objective import MomentumStop, l1_gradient
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.noise import NoisyPictures, Reference

# The name of the factor that all modules share in text-side form.
SHARED = "B"


class Learner:
    """One concept's increment while it is learnt: C_m or B, on a basis that stays as it is.

    Args:
        name: The concept's.
        basis: A, scaled (the paper's β S), (r, d).
        weights: W_m (d_out, d) by module name.
        pictures: Noisy pictures of the concept.
        config: The settings.
        start: An increment to start from, its A within the span of the basis. Default: zero.
        doors: What the increment does at further doors of the denoiser; it acts in training and is not learnt.

    Attributes:
        reference: What the next step learns from.

    Raises:
        ValueError: If text-side training is to start from a per-module increment.
    """

    def __init__(
        self,
        name: str,
        basis: Tensor,
        weights: Mapping[str, Tensor],
        pictures: NoisyPictures,
        config: SepMEConfig,
        start: Increment | None = None,
        doors: Mapping[str, Increment] | None = None,
    ) -> None:
        self.name, self.pictures, self.weights = name, pictures, weights
        self.device = next(iter(weights.values())).device
        self.basis = basis.float().to(self.device)
        self.stop = stop_rule(config)
        self.reference: Reference
        self.doors = doors or {}
        self.stopped = False
        self.warm = start is not None
        self.factors = {key: factor.requires_grad_() for key, factor in self._first(config, start).items()}

    def _first(self, config: SepMEConfig, start: Increment | None) -> dict[str, Tensor]:
        r, d = self.basis.shape
        heights = {SHARED: d} if config.parametrisation == "text" else {m: len(w) for m, w in self.weights.items()}
        if start is None:
            return {key: torch.zeros(height, r, device=self.device) for key, height in heights.items()}
        # Coordinates of its A in the basis: A = L S.
        coordinates = start.A.double().to(self.device) @ torch.linalg.pinv(self.basis.double())
        if config.parametrisation == "module":
            factors = start.coefficients(self.weights)
        elif start.B is not None:
            factors = {SHARED: start.B}
        else:
            raise ValueError("text-side training cannot start from a per-module increment")
        return {key: (factor.double().to(self.device) @ coordinates).float() for key, factor in factors.items()}

    @torch.no_grad()
    def sparsity_gradient(self) -> dict[str, Tensor]:
        """Differentiate Σ_m ‖ΔW_m‖₁ / M with respect to each factor, with one dense ΔW_m in memory at a time."""
        shared = self.factors.get(SHARED)
        slopes = {key: torch.zeros_like(factor) for key, factor in self.factors.items()}
        for module, weight in self.weights.items():
            if shared is None:
                slopes[module] = l1_gradient(self.factors[module], self.basis) / len(self.weights)
            else:  # C_m = W_m B
                w = weight.float()
                slopes[SHARED] += w.T @ l1_gradient(w @ shared, self.basis) / len(self.weights)
        return slopes

    def increment(self) -> Increment:
        """Return the increment as it is now, on the CPU."""
        factors = {key: factor.detach().cpu() for key, factor in self.factors.items()}
        if SHARED in factors:
            return Increment(self.basis.cpu(), B=factors[SHARED])
        return Increment(self.basis.cpu(), C=factors)

    def metrics(self) -> dict[str, Any]:
        """Report steps taken, the momentum statistic, and whether the rule stopped it."""
        return {"steps": self.stop.step, "momentum": self.stop.value, "stopped_by_rule": self.stopped}


def stop_rule(config: SepMEConfig) -> MomentumStop:
    """Return the stop rule that the settings ask for."""
    steps = config.min_steps
    return MomentumStop(config.momentum, config.tolerance, steps, config.relative, config.steps_per_batch)
