"""The training step and the null space of the paper, as in the authors' code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import ModelMixin, Transformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

from sepme_diffusers.algebra.objective import concept_representation, correlation_loss, sparsity
from sepme_diffusers.doors.attachment import attached
from sepme_diffusers.doors.family import TOKENS
from sepme_diffusers.doors.linears import projection_shapes
from sepme_diffusers.increment.config import SepMEConfig


def null_space_by_elimination(guard: Tensor) -> Tensor:
    """Find unit rows (d - rank, d), float64, that span the null space of G by elimination in sympy; not orthonormal.

    Args:
        guard: G, the token rows that must not change, (n_rows, d).

    Raises:
        ImportError: If sympy is missing.

    Source: the authors' code for arXiv 2402.05947, `Matrix(embeddings).nullspace()` on floats.
    """
    try:
        import sympy
    except ImportError as error:
        raise ImportError("elimination needs sympy: pip install 'sepme-diffusers[eval]'") from error
    solutions = sympy.Matrix(guard.cpu().numpy()).nullspace()
    basis = torch.from_numpy(np.array(solutions, dtype=np.float64).reshape(len(solutions), guard.shape[1]))
    return basis / basis.norm(dim=1, keepdim=True)


def checkpoint_residual_blocks(unet: ModelMixin, checkpointed: bool) -> None:
    """Compute what residual blocks keep for the gradient a second time instead; attention keeps what it needs."""
    unet.disable_gradient_checkpointing()
    if checkpointed:
        unet.enable_gradient_checkpointing()
        for module in unet.modules():
            if isinstance(module, Transformer2DModel | BasicTransformerBlock):
                module.gradient_checkpointing = False


class PaperStep:
    """Takes a training step as the paper does: two UNets, four passes, the full basis.

    ε(x_t, c) and ε(x_t, ∅) of the frozen UNet, and both of the edited one with gradient.

    Args:
        frozen: The original UNet; it predicts ε.
        edited: A copy of it.
        null: Rows that span the guard's null space, (k, d).
        concept: The embedding of the concept's prompt, (1, n_tokens, d).
        blank: That of the blank prompt, same shape.
        config: For its constants, see `SepMEConfig.paper`.
        as_coded: As the authors' code takes it: with the gradients of the edited UNet's own weights too, of which it
            uses none, and with its residual blocks checkpointed. Default: no gradient that is not needed, and nothing
            computed twice.

    Source: arXiv 2402.05947 and the authors' code for it. Theirs makes each dense increment three times a step (in
    both edited passes and for its norm), here it is made once.
    """

    def __init__(
        self,
        frozen: ModelMixin,
        edited: ModelMixin,
        null: Tensor,
        concept: Tensor,
        blank: Tensor,
        config: SepMEConfig,
        as_coded: bool = False,
    ) -> None:
        self.frozen, self.edited, self.as_coded = frozen, edited, as_coded
        self.basis, self.concept, self.blank, self.config = config.beta * null.float(), concept, blank, config
        self.coefficients = {
            name: torch.zeros(d_out, len(null), device=null.device, requires_grad=True)
            for name, (d_out, _) in projection_shapes(edited).items()
        }
        self.optimizer = torch.optim.Adam(self.coefficients.values(), lr=config.learning_rate)

    def __call__(self, noisy: Tensor, steps: Tensor) -> float:
        """Take a step on x_t (n, channels, h, w) at timesteps t (n,), and return the correlation loss before it."""
        with torch.no_grad():
            frozen = concept_representation(*self._both(self.frozen, noisy, steps))
        self.edited.requires_grad_(self.as_coded)
        checkpoint_residual_blocks(self.edited, self.as_coded)
        deltas = {name: w @ self.basis for name, w in self.coefficients.items()}
        with attached(self.edited, _DenseEdit(deltas)):
            edited = concept_representation(*self._both(self.edited, noisy, steps))
        loss = correlation_loss(edited, frozen)
        self.optimizer.zero_grad()
        (loss + self.config.sparsity * sparsity(deltas.values())).backward()
        self.optimizer.step()
        return loss.item()

    def _both(self, unet: ModelMixin, noisy: Tensor, steps: Tensor) -> list[Tensor]:
        states = (prompt.expand(len(noisy), -1, -1).to(unet.dtype) for prompt in (self.concept, self.blank))
        return [unet(noisy.to(unet.dtype), steps, state).sample.float() for state in states]


@dataclass(frozen=True, eq=False)
class _DenseEdit:
    """Dense increments ΔW_m behind the text Linears, as an edit of a denoiser."""

    deltas: Mapping[str, Tensor]
    at_linears: bool = True

    def edit(self, embeddings: Mapping[str, Tensor], pictures: int) -> tuple[dict[str, Tensor], Tensor]:
        return {}, embeddings[TOKENS]

    def change(self, name: str, reading: Tensor) -> Tensor:
        return (reading.float() @ self.deltas[name].T).to(reading.dtype)
