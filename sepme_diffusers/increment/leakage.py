"""Leakage: how far an increment moves prompts that it should leave alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from sepme_diffusers.algebra.rounding import rounding_share
from sepme_diffusers.increment.increment import Increment

# Below this leakage a guarded prompt's latents stay within 1e-4 of the original's.
_EXACT = 1e-5


# A reading this close below the gate may open it where embeddings are rounded in another way.
_MARGIN = 0.1


def output_norms(tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute ‖e W_mᵀ‖ of each token e (n_prompts, n_tokens, d) for each module, (n_prompts, n_tokens, M), float64."""
    return torch.stack([(tokens.float() @ weight.float().T).norm(dim=-1).double() for weight in weights.values()], -1)


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def leakage(
    increment: Increment, tokens: Tensor, weights: Mapping[str, Tensor], norms: Tensor | None = None
) -> Tensor:
    """Measure the largest ‖e ΔWᵀ‖ / ‖e Wᵀ‖ of a token e of each prompt, over all modules: (n_prompts,), float64.

    Zero for a prompt that leaves the gate shut, by a tenth of it at least: no rounding opens it elsewhere. What a
    compact A reads by its own rounding counts as zero, as at inference.

    Args:
        increment: The increment.
        tokens: The prompts' embeddings, (n_prompts, n_tokens, d).
        weights: W_m (d_out, d) by module name.
        norms: ‖e Wᵀ‖, where `output_norms` has given them already.
    """
    norms = output_norms(tokens, weights) if norms is None else norms
    e, a = tokens.double(), increment.A.double().to(tokens.device)
    read = e @ a.T
    if increment.is_compact:
        least = rounding_share(a.shape[1], increment.coarseness) * e.norm(dim=-1, keepdim=True) * a.norm(dim=1)
        read = read.masked_fill(read.abs() <= least, 0.0)
    if increment.gate is not None:
        read = read * (increment.reading(tokens) > (1 - _MARGIN) * increment.gate)[:, None, None]
    shares = []
    for c, outputs in zip(increment.coefficients(weights).values(), norms.unbind(-1), strict=True):
        # ‖C a‖² = aᵀ (CᵀC) a: by r numbers a token, not d_out.
        gram = c.double().T @ c.double()
        shares.append(((read @ gram) * read).sum(dim=-1).clamp(min=0).sqrt() / outputs)
    return torch.stack(shares).amax(dim=(0, 2)).cpu()


def measured_leakage(
    increment: Increment,
    guards: Sequence[str],
    tokens: Tensor,
    weights: Mapping[str, Tensor],
    damped: Collection[str] = (),
    norms: Tensor | None = None,
) -> dict[str, float | dict[str, float]]:
    """Measure the metrics `leakage`, the largest, and `leakage_of`, that of each guard that is not left exactly alone.

    Args:
        increment: The increment.
        guards: The prompts.
        tokens: Their embeddings, (n_prompts, n_tokens, d).
        weights: W_m (d_out, d) by module name.
        damped: Prompts that are not guarded exactly: they are listed however little they leak.
        norms: See `leakage`.
    """
    leaks = dict(zip(guards, leakage(increment, tokens, weights, norms).tolist(), strict=True))
    moved = {prompt: _short(leak) for prompt, leak in leaks.items() if leak > _EXACT or prompt in damped}
    return {"leakage": _short(max(leaks.values()))} | ({"leakage_of": moved} if moved else {})
