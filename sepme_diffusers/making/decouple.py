"""Older increments of a bank brought into the null space of the concepts that joined it later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from sepme_diffusers.algebra.imitation import imitation
from sepme_diffusers.algebra.subspace import project
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights
from sepme_diffusers.bank.entry import Entry
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.leakage import measured_leakage
from sepme_diffusers.making.guards import Guards
from sepme_diffusers.text.encoding import Encoded, rows

# Below this share of its effect, what is left of an increment is rounding.
_LEAST_KEPT = 1e-3


def decouple(bank: ConceptBank, pipe: Any) -> ConceptBank:
    """The bank with every increment guarded on the name of every other concept: A is projected, A NᵀN.

    Where the names do not all fit (see `guards.Guards`) A becomes A K instead, `imitation`: names are
    damped by what of them a direction holds, and what leaks is measured.

    An increment that knew all of them already is left as it is. What it cost each of the others is in its metrics:
    `effect_kept`, the share of its change of its own prompts' keys and values that is left, and `decoupled_from`.

    Args:
        bank: The bank; it is not changed.
        pipe: The pipeline that it was made for; only read.

    Raises:
        ValueError: If the bank is of another base, or the new guards would leave nothing of an increment.

    Source: arXiv 2402.05947 (weight decoupling), applied afterwards.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, pocket
        >>> from sepme_diffusers.making.decouple import decouple
        >>> bank = decouple(pocket.bank("styles"), SepMEPipeline.from_pretrained(pocket.path()))
        >>> all(promise.exact for promise in bank.guarantees.values())
        True
    """
    weights = projection_weights(pipe.unet)
    refuse_other_weights(bank, weights)
    refuse_other_text(pipe, [bank])
    encoded, changed = Encoded(pipe), []
    for name, entry in bank.items():
        if unknown := [other for other in bank if other != name and other not in entry.guards]:
            changed.append(_decoupled(entry, unknown, bank, encoded, weights))
    return bank.with_entries(changed)


def _decoupled(
    entry: Entry, unknown: list[str], bank: ConceptBank, encoded: Encoded, weights: Mapping[str, Tensor]
) -> Entry:
    guards, old = (*entry.guards, *unknown), entry.increment
    damped = entry.metrics.get("leakage_of", {})
    hard = [prompt for prompt in entry.guards if prompt not in bank and prompt not in damped]
    room = Guards(encoded, hard, [name for name in (*bank, *damped) if name != entry.concept.name], entry.config)
    null, tokens, a = room.null(entry.concept).cpu(), rows(encoded(entry.concept.prompts)).cpu(), old.A.cpu()
    if (penalty := room.penalty(entry.concept)) is None:
        a = project(a, null)
    else:
        a = a.double() @ imitation(tokens, null, penalty.cpu(), entry.config.ridge)
    increment = replace(old, A=a.to(old.A.dtype))
    kept = _effect_kept(old, increment, tokens, weights)
    if kept < _LEAST_KEPT:
        raise ValueError(
            f"guarded on {unknown} as well, nothing would be left of the increment of {entry.concept.name!r} "
            f"(share of its effect: {kept:.1e}); make it anew with fewer guards"
        )
    if old.gate is not None:
        own = encoded(entry.concept.prompts)
        increment = increment.gated(own, old.gate / float(old.reading(own).min()))
    metrics = {
        **{key: value for key, value in entry.metrics.items() if key != "leakage_of"},
        **measured_leakage(increment, guards, encoded(guards), weights, room.damped),
        "dimensions_left": len(null),
        "effect_kept": round(kept * float(entry.metrics.get("effect_kept", 1.0)), 6),
        "decoupled_from": [*entry.metrics.get("decoupled_from", ()), *unknown],
    }
    return replace(entry, increment=increment, guards=guards, metrics=metrics)


def _effect_kept(old: Increment, new: Increment, tokens: Tensor, weights: Mapping[str, Tensor]) -> float:
    """⟨E ΔW'ᵀ, E ΔWᵀ⟩ / ‖E ΔWᵀ‖² over all modules: both have the same coefficients C."""
    gram = cast(Tensor, sum(c.double().T @ c.double() for c in old.coefficients(weights).values())).cpu()
    before, after = (tokens.double() @ increment.A.double().cpu().T for increment in (old, new))
    return float(((after @ gram) * before).sum() / ((before @ gram) * before).sum())
