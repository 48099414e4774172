"""Older increments of a bank brought into the null space of the concepts that joined it later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.algebra.imitation import imitation
from sepme_diffusers.algebra.subspace import project
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_text, refuse_other_weights
from sepme_diffusers.bank.entry import Entry
from sepme_diffusers.bank.guard_sets import GuardSet
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.making.guards import Guards
from sepme_diffusers.making.kinds.wording import described
from sepme_diffusers.making.measure import LeakageMeter
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import TOKENS, Encoded, rows

# Below this share of its effect, what is left of an increment is rounding.
_LEAST_KEPT = 1e-3


def decouple(bank: ConceptBank, pipe: Any) -> ConceptBank:
    """Guard every increment of the bank on the name of every other concept: A is projected, A NᵀN.

    Where the names do not all fit (see `guards.Guards`) A becomes A K instead, with K of `imitation`: names are
    damped by what of them a direction holds, and what leaks is measured.

    An increment that knew all of them already is left as it is. What it cost each of the others is in its metrics:
    `effect_kept`, the share of its change of its own prompts' keys and values that is left (or of their embedding at a
    further door, where less is left), and `decoupled_from`.

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
    weights = {} if pipe.unet is None else projection_weights(pipe.unet)
    if weights:
        refuse_other_weights(bank, weights)
    refuse_other_text(pipe, [bank])
    encoded, decoupled = Encoded(pipe), []

    @cache
    def guards(door: str, hard: tuple[str, ...], names: tuple[str, ...], config: SepMEConfig) -> Guards:
        return Guards.of(encoded.at(door), hard, names, config)

    for name in bank:
        known = bank.entries.outline(name).guards
        if unknown := [other for other in bank if other != name and other not in known]:
            entry = bank[name]
            concept = described(entry.concept, pipe, encoded, tuple(bank)).concept
            decoupled.append(_decoupled(entry, concept, unknown, bank, encoded, guards, weights))
    return bank.with_entries(decoupled)


def _decoupled(
    entry: Entry,
    concept: Concept,
    unknown: list[str],
    bank: ConceptBank,
    encoded: Encoded,
    guards_of: Callable[..., Guards],
    weights: Mapping[str, Tensor],
) -> Entry:
    names = tuple(dict.fromkeys((*bank, *entry.guards.damped)))
    hard = tuple(prompt for prompt in entry.guards.exact if prompt not in names)
    parts = {TOKENS: entry.increment, **entry.increment.doors}
    rooms = {door: guards_of(door, hard, names, entry.config) for door in parts}
    owns = {door: EmbeddedConcept.at_door(concept, encoded.at(door)) for door in parts}
    projected = {door: _projected(part, owns[door], rooms[door]) for door, part in parts.items()}
    # A further door's increment changes the embedding itself, as a text-side one does without weights.
    share = min(
        _effect_kept(part, projected[door], owns[door], weights if door == TOKENS else {})
        for door, part in parts.items()
    )
    if share < _LEAST_KEPT:
        raise ValueError(
            f"guarded on {unknown} as well, nothing would be left of the increment of {concept.name!r} "
            f"(share of its effect: {share:.1e}); make it anew with fewer guards"
        )
    increment = replace(projected.pop(TOKENS), doors=projected)
    without_gate = rooms[TOKENS].without_gate()
    adapter = None if entry.adapter is None else _projected(entry.adapter, owns[TOKENS], without_gate)
    n_exact = min(room.n_exact for room in rooms.values())
    guarded = (*hard, *(name for name in names if name != concept.name))
    embeddings = {door: encoded.at(door)(guarded) for door in parts}

    def leaks(increment: Increment, n_exact: int) -> dict[str, Any]:
        meter = LeakageMeter({concept.name: increment}, weights, names[n_exact:])
        meter.update(guarded, embeddings)
        return meter.metrics(concept.name)

    metrics = {
        **{key: value for key, value in entry.metrics.items() if not key.startswith(("leakage", "gate_share"))},
        **leaks(increment, n_exact),
        **({} if adapter is None else {"adapter_leakage": leaks(adapter, without_gate.n_exact)["leakage"]}),
        "dimensions_left": len(rooms[TOKENS].null(concept)),
        "effect_kept": round(share * float(entry.metrics.get("effect_kept", 1.0)), 6),
        "decoupled_from": [*entry.metrics.get("decoupled_from", ()), *unknown],
    }
    known = [outline.guards.set for outline in bank.entries.outlines().values()]
    # With its own name, so that all entries share one set.
    guards = GuardSet.of((*hard, *names[:n_exact]), names[n_exact:], known)
    return replace(entry, increment=increment, adapter=adapter, guard_set=guards, metrics=metrics)


def _projected(old: Increment, concept: EmbeddedConcept, room: Guards) -> Increment:
    """The increment with A in the null space, or damped where the names do not fit; its gate at the same share."""
    null, a = room.null(concept.concept).cpu(), old.A.cpu()
    penalty = room.penalty(concept, null)
    own = concept.own.cpu()
    exact = penalty is None
    a = project(a, null) if exact else a.double() @ imitation(rows(own), null, penalty, room.config.ridge)
    projected = replace(old, A=a.to(old.A.dtype))
    return projected if old.gate is None else projected.gated(own, old.gate / float(old.reading(own).min()))


def _effect_kept(old: Increment, new: Increment, concept: EmbeddedConcept, weights: Mapping[str, Tensor]) -> float:
    """⟨E ΔW'ᵀ, E ΔWᵀ⟩ / ‖E ΔWᵀ‖² over all modules, or of the embedding's change: both have the same coefficients C."""
    tokens = concept.rows.cpu().double()
    outputs = weights or {"": torch.eye(tokens.shape[1])}
    gram = torch.stack([c.double().T @ c.double() for c in old.coefficients(outputs).values()]).sum(dim=0).cpu()
    before, after = (tokens @ increment.A.double().cpu().T for increment in (old, new))
    return float(((after @ gram) * before).sum() / ((before @ gram) * before).sum())
