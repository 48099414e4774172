"""Concept-irrelevant unlearning: representation, loss, stop rule. Tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


def concept_representation(noise_with: Tensor, noise_without: Tensor) -> Tensor:
    """Return r_c = ε(x_t, c) − ε(x_t, c without the concept): what the concept adds to the predicted noise.

    Args:
        noise_with: Predicted noise for the prompt, (n, channels, h, w).
        noise_without: Predicted noise for the same prompt without the concept, same shape.

    Source: arXiv 2402.05947.
    """
    return noise_with - noise_without


def correlation_loss(edited: Tensor, frozen: Tensor) -> Tensor:
    """Return L_cor = mean over the batch of Σ r_c(θ+Δθ) ⊙ r_c(θ) / (h w channels), a scalar.

    Zero is the target: below it the edit only destroys what has nothing to do with the concept.

    Source: arXiv 2402.05947.
    """
    return correlations(edited, frozen).mean()


def correlations(edited: Tensor, frozen: Tensor) -> Tensor:
    """Return r_c(θ+Δθ) ⊙ r_c(θ), (n, channels, h, w): what `correlation_loss` is the mean of."""
    return edited * frozen


def sparsity(deltas: Iterable[Tensor]) -> Tensor:
    """Return ‖ΔW‖₁ / M over the M edited layers, a scalar.

    Source: arXiv 2402.05947.
    """
    norms = [delta.abs().sum() for delta in deltas]
    return torch.stack(norms).sum() / len(norms)


def l1_gradient(coefficients: Tensor, basis: Tensor) -> Tensor:
    """Differentiate ‖C A‖₁ with respect to C: sign(C A) Aᵀ, (d_out, r).

    Args:
        coefficients: C, (d_out, r).
        basis: A, (r, d).
    """
    return (coefficients @ basis).sign_() @ basis.T


def balance(sizes: Sequence[float]) -> list[float]:
    """Return η_i = max_k ‖L_k‖ / ‖L_i‖: weights with which every concept's loss counts as much as the largest.

    Args:
        sizes: ‖L_i‖ = ‖r_i(θ+Δθ) ⊙ r_i(θ)‖, one number per concept. Unlike the mean, whose sign changes on the way,
            it is small only where nothing is left to unlearn.

    Source: arXiv 2402.05947 (joint variant).
    """
    return [max(sizes) / size if size else 1.0 for size in sizes]


@dataclass
class MomentumStop:
    """The stop rule: L_mom <- α L_mom + (1 − α) L_cor, stop when L_mom <= τ, never before `min_steps`.

    The statistic starts at the first loss. Where several steps share a noisy batch it takes in the first loss of each:
    the others tell of the same noise, and of steps that have followed it.

    Args:
        momentum: α.
        tolerance: τ.
        min_steps: Steps that are always taken.
        relative: Read τ as a share of the first scale: the correlation of the original with itself.
        steps_per_batch: Steps that share a noisy batch.

    Source: arXiv 2402.05947; there every step has a batch of its own.

    Example:
        >>> stop = MomentumStop(momentum=0.5, tolerance=0.3, min_steps=1)
        >>> [stop.update(loss) for loss in (1.0, 0.0, 0.0)]
        [False, False, True]
    """

    momentum: float
    tolerance: float
    min_steps: int
    relative: bool = False
    steps_per_batch: int = 1
    step: int = field(default=0, init=False)
    value: float = field(default=float("nan"), init=False)
    scale: float = field(default=float("nan"), init=False)

    def update(self, loss: float, scale: float = 1.0) -> bool:
        """Take in one step's correlation loss, and that of the original; return whether to stop."""
        if self.step == 0:
            self.value, self.scale = loss, scale
        elif self.between_batches:
            self.value = self.momentum * self.value + (1 - self.momentum) * loss
        self.step += 1
        return self.step >= self.min_steps and self.value <= self.threshold(self.scale)

    @property
    def between_batches(self) -> bool:
        """Whether the next step takes a new noisy batch."""
        return self.step % self.steps_per_batch == 0

    def threshold(self, scale: float) -> float:
        """Return what the statistic must fall to, where the original's correlation is `scale`."""
        return self.tolerance * (scale if self.relative else 1.0)
