"""Other erasers made separable: their change of the weights, without what it does to the guards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from sepme_diffusers.algebra.imitation import imitated, separable_factors
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import Entry
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.leakage import measured_leakage
from sepme_diffusers.interchange.weight_change import Source, WeightChange, read_change
from sepme_diffusers.making.guards import Guards
from sepme_diffusers.making.soft_guards import SoftGuards, as_soft_guards
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.text.concept import BLANK, Concept, as_concepts
from sepme_diffusers.text.encoding import Encoded, rows

Method = Literal["imitate", "project"]

# Below this share of an eraser's effect, or of the concept's embedding, what the guards leave is rounding.
_LEAST_KEPT = 1e-4


def from_lora(
    source: Source,
    pipe: Any,
    concepts: Iterable[Concept | str],
    guards: Sequence[str] = (BLANK,),
    soft_guards: SoftGuards | Sequence[str] = (),
    bank: ConceptBank | None = None,
    config: SepMEConfig | None = None,
    method: Method = "imitate",
    difference: bool = False,
) -> ConceptBank:
    """Make a bank from an eraser of another method: a LoRA, or edited weights (ESD, UCE, MACE ...).

    Its change of the text projections is brought into the null space of the guards. Then it is cut to the rank, by
    its effect on the concept's own tokens. From then on it is erased, combined and restored like any other increment,
    and leaves the guarded prompts exactly alone. What it changes elsewhere cannot be kept.

    The entry's metrics say what each step cost. `effect_kept_within_guards` and, after the cut to the rank,
    `effect_kept`: how much of the wanted change of the concept's keys and values is made (1: all of it).
    `guard_damage_before` and `guard_damage_after`: how much of the guarded prompts' keys and values changes.
    `share_representable`: the text projections' share of the eraser's whole change; `parts_outside`: how many other
    modules it changes.

    Args:
        source: Tensors by name, a .safetensors file or a folder with one, see `weight_change.read_change`.
        pipe: The pipeline that the eraser was made for; only read.
        concepts: What it erases. With several, each gets an increment of its own, guarded on the others' names.
        guards: Prompts that must not change, beside the blank one and the other concepts of the bank.
        soft_guards: Regular prompts that should change little, or `SoftGuards`; only where the eraser is imitated.
        bank: The bank to add to.
        config: Its `rank`, `guard_tolerance`, `ridge` and `soft_guard_weight` are used.
        method: "imitate" solves for the edit inside the null space that does to the concept's prompts what the eraser
            does. "project" takes ΔW NᵀN: what the eraser does to any prompt, less what the guards have in common with
            it, which weakens it on the concept too.
        difference: The source's weights are differences, not edited weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If nothing in the source is understood or can be kept, it was made for another base, or the
            guards take away all that it does to a concept.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, export_lora, from_lora, pocket
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> file = export_lora(pocket.bank("styles"), pipe, ["neon"], "neon.safetensors", format="kohya")
        >>> list(from_lora(file, pipe, ["neon"]))
        ['neon']
    """
    if method not in get_args(Method):
        raise ValueError(f"no method {method!r}; choose one of {list(get_args(Method))}")
    adopted = as_concepts(concepts)
    config = config or SepMEConfig(solver="closed_form")
    base = SepMETrainer(pipe, config).base()
    bank = bank if bank is not None else ConceptBank(base)
    # What is adopted are per-module increments, which belong to these weights.
    if reason := bank.base.fingerprint.differs(base.fingerprint):
        raise ValueError(f"the bank was made on {bank.base.name!r}, and this is another base: {reason}")
    change = read_change(source, pipe.unet, difference)
    if not change.inside:
        raise ValueError(
            f"nothing of this eraser can be kept: it leaves attn2.to_k and attn2.to_v as they are and changes "
            f"{len(change.outside)} other modules, such as {list(change.outside)[:3]}"
        )
    encoded, soft = Encoded(pipe), cast("SoftGuards | None", as_soft_guards(pipe, soft_guards))
    names = dict.fromkeys((*bank, *(concept.name for concept in adopted)))
    room = Guards(encoded, tuple(dict.fromkeys((BLANK, *guards))), names, config)
    entries = []
    for concept in adopted:
        regular = None if soft is None else config.soft_guard_weight * soft.without(pipe, concept)
        penalties = [part.cpu() for part in (room.penalty(concept), regular) if part is not None]
        penalty = cast(Tensor, sum(penalties)) if penalties else None
        entries.append(_entry(concept, room, penalty, encoded, change, pipe, config, method))
    return bank.with_entries(entries)


def _entry(
    concept: Concept,
    room: Guards,
    penalty: Tensor | None,
    encoded: Encoded,
    change: WeightChange,
    pipe: Any,
    config: SepMEConfig,
    method: Method,
) -> Entry:
    guards = room.prompts(concept)
    weights = {name: weight.detach().cpu() for name, weight in projection_weights(pipe.unet).items()}
    deltas = {name: delta.cpu() for name, delta in change.inside.items()}
    tokens, guarded = (rows(encoded(prompts)).cpu().double() for prompts in (concept.prompts, guards))
    null = room.null(concept).cpu()
    _refuse_without_effect(concept, guards, deltas, tokens, null)
    if method == "imitate":
        inside = imitated(deltas, tokens, null, penalty, config.ridge)
    else:
        inside = {name: delta.double() @ null.T @ null for name, delta in deltas.items()}
    a, c = separable_factors(inside, tokens, null, config.rank)
    c = {name: c.get(name, torch.zeros(len(weight), len(a))).float() for name, weight in weights.items()}
    increment = Increment(a.float(), C=c)
    changes = {name: factor.double() @ increment.A.double() for name, factor in c.items()}
    original = _norm(weights, guarded)
    metrics = {
        "effect_kept_within_guards": _kept(inside, deltas, tokens),
        "effect_kept": _kept(changes, deltas, tokens),
        "guard_damage_before": _norm(deltas, guarded) / original,
        "guard_damage_after": _norm(changes, guarded) / original,
        "source": change.kind,
        "method": method,
        "share_representable": change.share_inside,
        "parts_outside": len(change.outside),
        "tensors_unread": len(change.unread),
        "dimensions_left": len(null),
        **measured_leakage(increment, guards, encoded(guards).cpu(), weights, room.damped),
    }
    return Entry(concept, increment, config, guards, metrics)


def _refuse_without_effect(
    concept: Concept, guards: Sequence[str], deltas: Mapping[str, Tensor], tokens: Tensor, null: Tensor
) -> None:
    if not (whole := _norm(deltas, tokens)):
        raise ValueError(f"this eraser does nothing to the tokens of {concept.name!r}: {list(concept.prompts)}")
    free = tokens @ null.T @ null
    if free.norm() < _LEAST_KEPT * tokens.norm() or _norm(deltas, free) < _LEAST_KEPT * whole:
        raise ValueError(
            f"the {len(guards)} guard prompts take away all that this eraser does to {concept.name!r}; guard fewer"
        )


def _norm(deltas: Mapping[str, Tensor], tokens: Tensor) -> float:
    """Compute ‖E ΔWᵀ‖ over all modules side by side."""
    return float(sum((tokens @ delta.double().T).square().sum() for delta in deltas.values())) ** 0.5


def _kept(changes: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tokens: Tensor) -> float:
    """Compute ⟨E Dᵀ, E ΔWᵀ⟩ / ‖E ΔWᵀ‖²: the share of the wanted change that is made."""
    pairs = ((tokens @ changes[name].T, tokens @ delta.double().T) for name, delta in wanted.items())
    return float(sum((kept * whole).sum() for kept, whole in pairs)) / _norm(wanted, tokens) ** 2
