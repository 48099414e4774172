"""Other erasers, as small as they can be said, and fused weights in force: what an erasure is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, nn

from sepme_diffusers.algebra.objective import concept_representation, correlation_loss, sparsity
from sepme_diffusers.doors.linears import projection_weights, text_projections
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.text.concept import Concept, encode, rows


def uce(
    pipe: Any, concepts: Sequence[Concept], preserved: Sequence[str], ridge: float = 0.1, preserve: float = 1.0
) -> dict[str, Tensor]:
    """Weights edited by unified concept editing, all concepts in one fused edit: {parameter name: weight}.

    Anchors in place of the concepts, the preserved prompts as they were:

        W ← W (Σ e* eᵀ + λ_p Σ p pᵀ + ε I) (Σ e eᵀ + λ_p Σ p pᵀ + ε I)⁻¹

    Args:
        pipe: The pipeline; only read.
        concepts: What to erase.
        preserved: Prompts p to keep. Their total weight is `preserve` times that of the concepts' prompts.
        ridge: ε.
        preserve: λ_p, before it is divided by the numbers of rows.

    Source: arXiv 2308.14761.
    """
    edited = rows(encode(pipe, [prompt for concept in concepts for prompt in concept.prompts])).double()
    anchors = rows(_anchors(pipe, concepts)).double()
    still = ridge * torch.eye(edited.shape[1], dtype=torch.float64, device=edited.device)
    if preserved:
        kept = rows(encode(pipe, preserved)).double()
        still = still + preserve * len(edited) / len(kept) * kept.T @ kept
    operator = torch.linalg.solve(edited.T @ edited + still, edited.T @ anchors + still)
    weights = projection_weights(pipe.unet)
    return {f"{name}.weight": (weight.double() @ operator.T).float() for name, weight in weights.items()}


def _anchors(pipe: Any, concepts: Sequence[Concept]) -> Tensor:
    """The mean embedding of each pair's anchors, (n_pairs, n_tokens, d)."""
    groups = [prompts for concept in concepts for prompts in concept.anchors]
    unique = list(dict.fromkeys(prompt for prompts in groups for prompt in prompts))
    encoded = dict(zip(unique, encode(pipe, unique), strict=True))
    return torch.stack([sum(encoded[prompt] for prompt in prompts) / len(prompts) for prompts in groups])


def null_space_by_elimination(guard: Tensor) -> Tensor:
    """Unit rows (d - rank, d), float64, that span the null space of G: not orthonormal, by elimination in sympy.

    Args:
        guard: G, the token rows that must not change, (n_rows, d).

    Source: the authors' code for arXiv 2402.05947, `Matrix(embeddings).nullspace()` on floats.
    """
    solutions = sympy.Matrix(guard.cpu().numpy()).nullspace()
    basis = torch.from_numpy(np.array(solutions, dtype=np.float64).reshape(len(solutions), guard.shape[1]))
    return basis / basis.norm(dim=1, keepdim=True)


class PaperStep:
    """A training step as the paper takes it: two UNets, four passes, the full basis.

    ε(x_t, c) and ε(x_t, ∅) of the frozen UNet, and both of the edited one with gradient.

    Args:
        frozen: The original UNet; it predicts ε.
        edited: A copy of it.
        null: Rows that span the guard's null space, (k, d).
        concept: The embedding of the concept's prompt, (1, n_tokens, d).
        blank: That of the blank prompt, same shape.
        config: For its constants, see `SepMEConfig.paper`.
        freeze: Leave the edited UNet's own weights out of the gradient. The authors' code computes their gradients
            too, and uses none of them.

    Source: arXiv 2402.05947 and the authors' code for it. Theirs makes each dense increment three times a step (in
    both edited passes and for its norm), here it is made once.
    """

    def __init__(
        self,
        frozen: nn.Module,
        edited: nn.Module,
        null: Tensor,
        concept: Tensor,
        blank: Tensor,
        config: SepMEConfig,
        freeze: bool = True,
    ) -> None:
        self.frozen, self.edited, self.freeze = frozen, edited, freeze
        self.basis, self.concept, self.blank, self.config = config.beta * null.float(), concept, blank, config
        self.modules = text_projections(edited)
        self.coefficients = {
            name: torch.zeros(module.out_features, len(null), device=null.device, requires_grad=True)
            for name, module in self.modules.items()
        }
        self.optimizer = torch.optim.Adam(self.coefficients.values(), lr=config.learning_rate)

    def __call__(self, noisy: Tensor, steps: Tensor) -> float:
        """Take a step on x_t (n, channels, h, w) at timesteps t (n,); the correlation loss before it."""
        with torch.no_grad():
            frozen = concept_representation(*self._both(self.frozen, noisy, steps))
        self.edited.requires_grad_(not self.freeze)
        deltas = {name: w @ self.basis for name, w in self.coefficients.items()}
        handles = self._attached(deltas)
        try:
            edited = concept_representation(*self._both(self.edited, noisy, steps))
        finally:
            for handle in handles:
                handle.remove()
        loss = correlation_loss(edited, frozen)
        self.optimizer.zero_grad()
        (loss + self.config.sparsity * sparsity(deltas.values())).backward()
        self.optimizer.step()
        return loss.item()

    def _both(self, unet: nn.Module, noisy: Tensor, steps: Tensor) -> list[Tensor]:
        states = (prompt.expand(len(noisy), -1, -1).to(unet.dtype) for prompt in (self.concept, self.blank))
        return [unet(noisy.to(unet.dtype), steps, state).sample.float() for state in states]

    def _attached(self, deltas: Mapping[str, Tensor]) -> list[Any]:
        def hook(name: str) -> Any:
            return lambda module, inputs, output: output + (inputs[0].float() @ deltas[name].T).to(output.dtype)

        return [module.register_forward_hook(hook(name)) for name, module in self.modules.items()]


@contextmanager
def replaced(unet: torch.nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other weights in a UNet while the block runs; then its own again, bit for bit."""
    parameters = {name: parameter for name, parameter in unet.named_parameters() if name in weights}
    own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        unet.load_state_dict(weights, strict=False)
        yield
    finally:
        unet.load_state_dict(own, strict=False)
