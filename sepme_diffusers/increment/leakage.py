"""Leakage: how far an increment moves prompts that it should leave alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.algebra.rounding import rounding_share
from sepme_diffusers.increment.increment import Increment

# Below this leakage a guarded prompt's latents stay within 1e-4 of the original's.
_EXACT = 1e-5
# A reading this close below the gate may open it where embeddings are rounded in another way.
_MARGIN = 0.1
# So many of the damped guards that leak are named.
_LISTED = 10


def output_norms(tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute ‖e W_mᵀ‖ of each token e (n_prompts, n_tokens, d) for each module, (n_prompts, n_tokens, M), float64."""
    return torch.stack([(tokens.float() @ weight.float().T).norm(dim=-1).double() for weight in weights.values()], -1)


def leakage(
    increment: Increment,
    tokens: Tensor,
    weights: Mapping[str, Tensor],
    norms: Tensor | None = None,
    further: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Measure the largest ‖e ΔWᵀ‖ / ‖e Wᵀ‖ of a token e of each prompt, over all modules: (n_prompts,), float64.

    At a further door the embedding itself counts, ‖e Aᵀ Bᵀ‖ / ‖e‖; the largest of all doors is returned.

    Zero for a prompt that leaves the gate shut, by a tenth of it at least: no rounding opens it elsewhere. What a
    compact A reads by its own rounding counts as zero, as at inference.

    Args:
        increment: The increment.
        tokens: The prompts' embeddings, (n_prompts, n_tokens, d).
        weights: W_m (d_out, d) by module name.
        norms: ‖e Wᵀ‖, where `output_norms` has given them already.
        further: The prompts' embeddings at further doors, by door, (n_prompts, 1, d_door) for a pooled one.

    Raises:
        ValueError: If the increment acts at a further door whose embeddings are not given.
    """
    if missing := increment.doors.keys() - (further or {}).keys():
        raise ValueError(f"the increment acts at the doors {sorted(missing)}, whose embeddings are needed as well")
    norms = output_norms(tokens, weights) if norms is None else norms
    leaks = [_leakage_at_one_door(increment, tokens, weights, norms)]
    for door, part in increment.doors.items():
        embeddings = (further or {})[door]
        identity = {"": torch.eye(embeddings.shape[-1], device=embeddings.device)}
        leaks.append(_leakage_at_one_door(part, embeddings, identity, embeddings.double().norm(dim=-1, keepdim=True)))
    return torch.stack(leaks).amax(dim=0)


def _leakage_at_one_door(increment: Increment, tokens: Tensor, weights: Mapping[str, Tensor], norms: Tensor) -> Tensor:
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


def leakage_metrics(guards: Sequence[str], leaks: Tensor, damped: Collection[str] = ()) -> dict[str, Any]:
    """State what guards leak: `leakage`, the largest; `leakage_of`, that of single guards; `leakage_rest`, a bound.

    Guards that should be exact are listed if they are not. Of damped ones the ten worst are listed; `leakage_rest` is
    the largest leak of the others, and is left out where none of them leaks.

    Args:
        guards: The prompts.
        leaks: What each of them leaks, (n_prompts,).
        damped: Prompts that are not guarded exactly.
    """
    damped = set(damped)
    moved = [(leak, guard) for guard, leak in zip(guards, leaks.tolist(), strict=True) if leak > 0]
    of_damped = sorted((pair for pair in moved if pair[1] in damped), reverse=True)
    worst = [pair for pair in of_damped[:_LISTED] if pair[0] > _EXACT]
    listed = [*(pair for pair in moved if pair[1] not in damped and pair[0] > _EXACT), *worst]
    metrics: dict[str, Any] = {"leakage": _short(float(leaks.max()))}
    if listed:
        metrics["leakage_of"] = {guard: _short(leak) for leak, guard in listed}
    if rest := of_damped[len(worst) :]:
        metrics["leakage_rest"] = _short(rest[0][0])
    return metrics


def _short(value: float) -> float:
    return float(f"{value:.3g}")
