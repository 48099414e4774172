"""Leakage: how far an increment moves prompts that it should leave alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from sepme_diffusers.algebra.rounding import rounding_share
from sepme_diffusers.increment.increment import Increment

# Below this leakage a guarded prompt's latents stay within 1e-4 of the original's.
_EXACT = 1e-5
# A reading this close below the gate may open it where embeddings are rounded in another way.
_MARGIN = 0.1
MOST_LISTED = 10
"""How many of the damped guards that leak are named."""
_Gate = TypeVar("_Gate", float, Tensor)


def output_norms(tokens: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """Compute ‖e W_mᵀ‖ of each token e (n_prompts, n_tokens, d) for each module, (n_prompts, n_tokens, M), float64."""
    return torch.stack([(tokens.float() @ weight.float().T).norm(dim=-1).double() for weight in weights.values()], -1)


def leakage(
    increment: Increment,
    tokens: Tensor,
    weights: Mapping[str, Tensor] | None = None,
    norms: Tensor | None = None,
    further: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Measure by how much an increment moves each prompt: the largest share of a token e, (n_prompts,), float64.

    Of a text-side increment it is the share of the embedding, ‖e Aᵀ Bᵀ‖ / ‖e‖, the largest of all doors. Of a
    per-module one it is that of the keys and values at the tokens' door, ‖e ΔWᵀ‖ / ‖e Wᵀ‖, the largest of all modules.

    Zero for a prompt that leaves the gate shut, by a tenth of it at least: no rounding opens it elsewhere. What a
    compact A reads by its own rounding counts as zero, as at inference.

    Args:
        increment: The increment.
        tokens: The prompts' embeddings, (n_prompts, n_tokens, d).
        weights: W_m (d_out, d) by module name, for per-module increments.
        norms: ‖e Wᵀ‖, where `output_norms` has given them already.
        further: The prompts' embeddings at further doors, by door, (n_prompts, 1, d_door) for a pooled one.

    Raises:
        ValueError: If the increment acts at a further door whose embeddings are not given, or is per-module and there
            are no weights.
    """
    if missing := increment.doors.keys() - (further or {}).keys():
        raise ValueError(f"the increment acts at the doors {sorted(missing)}, whose embeddings are needed as well")
    if increment.B is None and not weights:
        raise ValueError("how far a per-module increment moves prompts takes the weights of the denoiser")
    if increment.B is not None:
        leaks = [_of_embedding(increment, tokens)]
    else:
        weights = weights or {}
        norms = output_norms(tokens, weights) if norms is None else norms
        factors = increment.coefficients(weights).values()
        leaks = [_share(_read(increment, tokens), factors, norms.unbind(-1))]
    leaks += [_of_embedding(part, (further or {})[door]) for door, part in increment.doors.items()]
    return torch.stack(leaks).amax(dim=0)


def _of_embedding(increment: Increment, tokens: Tensor) -> Tensor:
    factors = () if increment.B is None else (increment.B.to(tokens.device),)
    return _share(_read(increment, tokens), factors, [tokens.double().norm(dim=-1)])


def _read(increment: Increment, tokens: Tensor) -> Tensor:
    """What the increment reads of each token, e Aᵀ (n_prompts, n_tokens, r), float64: zero where it does not act."""
    e, a = tokens.double(), increment.A.double().to(tokens.device)
    read = e @ a.T
    if increment.is_compact:
        least = rounding_share(a.shape[1], increment.coarseness) * e.norm(dim=-1, keepdim=True) * a.norm(dim=1)
        read = read.masked_fill(read.abs() <= least, 0.0)
    if increment.gate is not None:
        read = read * (increment.reading(tokens) > least_opening(increment.gate))[:, None, None]
    return read


def _share(read: Tensor, factors: Iterable[Tensor], norms: Iterable[Tensor]) -> Tensor:
    """The largest ‖F a‖ / norm of a token's reading a, over all factors F (d_out, r), (n_prompts,)."""
    shares = []
    for factor, outputs in zip(factors, norms, strict=True):
        # ‖F a‖² = aᵀ (FᵀF) a: by r numbers a token, not d_out.
        gram = factor.double().T @ factor.double()
        shares.append(((read @ gram) * read).sum(dim=-1).clamp(min=0).sqrt() / outputs)
    return torch.stack(shares).amax(dim=(0, 2)).cpu()


def least_opening(gate: _Gate) -> _Gate:
    """Return the reading from which on a gate may open where embeddings are rounded in another way."""
    return (1 - _MARGIN) * gate


def leakage_metrics(exact: Mapping[str, float], worst: Sequence[tuple[float, str]] = ()) -> dict[str, Any]:
    """State what guards leak: `leakage`, the largest; `leakage_of`, that of single guards; `leakage_rest`, a bound.

    Guards that should be exact are listed if they are not. Of damped ones the ten worst are listed; `leakage_rest` is
    the largest leak of the others, and is left out where none of them leaks.

    Args:
        exact: {prompt: its leak} of guards that should be exact; those below 1e-5 count as such.
        worst: (leak, prompt) of the damped guards that leak most, in that order: the `MOST_LISTED` worst and one more.
    """
    worst = [pair for pair in worst if pair[0] > 0]
    listed = [pair for pair in worst[:MOST_LISTED] if pair[0] > _EXACT]
    leaks = {prompt: leak for prompt, leak in exact.items() if leak > _EXACT} | {name: leak for leak, name in listed}
    metrics: dict[str, Any] = {"leakage": _short(max([*exact.values(), *(leak for leak, _ in worst)], default=0.0))}
    if leaks:
        metrics["leakage_of"] = {prompt: _short(leak) for prompt, leak in leaks.items()}
    if rest := worst[len(listed) :]:
        metrics["leakage_rest"] = _short(rest[0][0])
    return metrics


def _short(value: float) -> float:
    return float(f"{value:.3g}")
