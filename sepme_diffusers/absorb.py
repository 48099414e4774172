"""Other erasers made separable: what they change, kept off the guards and cut down to what the concept feels."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.bank import ConceptBank, Entry
from sepme_diffusers.concepts import BLANK, Concept, as_concepts, encode, rows
from sepme_diffusers.config import SepMEConfig
from sepme_diffusers.foreign import Source, WeightChange, read_change
from sepme_diffusers.increment import Increment
from sepme_diffusers.subspace import null_space
from sepme_diffusers.targets import projection_weights
from sepme_diffusers.training import SepMETrainer

# An eraser of rank r has r effects; what rounding adds lies below this share of the largest.
_LEAST_EFFECT = 1e-6
# Below this share of an eraser's effect, what the guards leave of it is rounding.
_LEAST_KEPT = 1e-4


def from_lora(
    source: Source,
    pipe: Any,
    concepts: Iterable[Concept | str],
    guards: Sequence[str] = (BLANK,),
    bank: ConceptBank | None = None,
    rank: int = 16,
    guard_tolerance: float = 1e-6,
    difference: bool = False,
) -> ConceptBank:
    """A bank from an eraser that was made with another method: a LoRA, or edited weights (ESD, UCE, MACE ...).

    Its change of the text projections is projected on the null space of the guards, ΔW NᵀN, and factored by reduced
    rank, cut by effect on the concept's own tokens. From then on it is erased, combined and restored like any other
    increment, and leaves the guarded prompts exactly alone. What it changes elsewhere cannot be kept.

    What each step cost stands in the entry's metrics. Of the eraser's effect on the concept's tokens: `effect_kept`,
    `effect_lost_to_guards` and `effect_lost_to_rank`. Of the guarded prompts' keys and values, how much changes:
    `guard_damage_before` and `guard_damage_after`. Of the whole change: `share_representable`, the share of the text
    projections, and `parts_outside`, how many other modules it has.

    Args:
        source: Tensors by name, a .safetensors file or a folder with one, see `foreign.read_change`.
        pipe: The pipeline that the eraser was made for; only read.
        concepts: What it erases. With several, each gets an increment of its own, guarded on the others' names.
        guards: Prompts that must not change, beside the blank one and the other concepts of the bank.
        bank: The bank to add to.
        rank: Of each increment.
        guard_tolerance: See `SepMEConfig`.
        difference: The source's weights are differences, not edited weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If nothing in the source is understood or representable, it was made for another base, it does
            nothing to a concept that the guards leave room for, or the pipeline has erasures active.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, pocket
        >>> from sepme_diffusers.absorb import from_lora
        >>> from sepme_diffusers.export import export_lora
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> file = export_lora(pocket.bank("styles"), pipe, ["neon"], "neon.safetensors", format="kohya")
        >>> list(from_lora(file, pipe, ["neon"]))
        ['neon']
    """
    found = as_concepts(concepts)
    config = SepMEConfig(solver="closed_form", rank=rank, guard_tolerance=guard_tolerance)
    base = SepMETrainer(pipe, config).base()
    bank = bank if bank is not None else ConceptBank(base)
    if bank.base.width != base.width:
        raise ValueError(f"the bank is for embeddings of width {bank.base.width}, not {base.width}")
    change = read_change(source, pipe.unet, difference)
    if not change.inside:
        raise ValueError(
            f"nothing of this eraser can be kept: it leaves attn2.to_k and attn2.to_v as they are and changes "
            f"{len(change.outside)} other modules, such as {list(change.outside)[:3]}"
        )
    names = dict.fromkeys((*bank, *(concept.name for concept in found)))
    return bank.with_entries(
        [
            _entry(concept, (BLANK, *guards, *(name for name in names if name != concept.name)), change, pipe, config)
            for concept in found
        ]
    )


def separable_factors(
    deltas: Mapping[str, Tensor], concept: Tensor, null: Tensor, rank: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Factors A (r, d) and C_m (d_out, r), float64, of the rank-r part of ΔW NᵀN that the concept feels most.

    Of all D of rank r with rows in the null space it minimises Σ_m ‖E (ΔW_m NᵀN − D_m)ᵀ‖² with one A shared by all
    modules (Eckart–Young on ΔW Nᵀ (N EᵀE Nᵀ)^½, modules stacked), and acts on every other token as ΔW does within
    these directions.

    Args:
        deltas: ΔW_m (d_out, d) by module name.
        concept: E, the concept's token rows, (n, d).
        null: N, orthonormal rows of the guard's null space, (k, d).
        rank: r; fewer where fewer directions have an effect.

    Raises:
        ValueError: If there is no effect at all.
    """
    null = null.double()
    _, sizes, directions = torch.linalg.svd(concept.double() @ null.T, full_matrices=False)
    probes = (directions @ null).T * sizes
    effects = {name: delta.double() @ probes for name, delta in deltas.items()}
    squares, right = torch.linalg.eigh(sum(effect.T @ effect for effect in effects.values()))
    if not squares[-1] > 0:
        raise ValueError("its change does nothing to the concept's tokens that the guards leave room for")
    values = squares.clamp(min=0).sqrt().flip(0)[:rank]
    kept = values > _LEAST_EFFECT * values[0]
    right = right.flip(1)[:, :rank][:, kept] / values[kept]
    c = {name: effect @ right for name, effect in effects.items()}
    a = sum(c[name].T @ delta.double() for name, delta in deltas.items())
    return a @ null.T @ null, c


def _entry(concept: Concept, guards: tuple[str, ...], change: WeightChange, pipe: Any, config: SepMEConfig) -> Entry:
    started = time.perf_counter()
    guards = tuple(dict.fromkeys(guards))
    weights = {name: weight.detach().cpu() for name, weight in projection_weights(pipe.unet).items()}
    deltas = {name: delta.cpu() for name, delta in change.inside.items()}
    tokens, guarded = (rows(encode(pipe, prompts)).cpu().double() for prompts in (concept.prompts, guards))
    null = null_space(guarded, config.guard_tolerance)
    if not (whole := _effect(deltas, tokens)):
        raise ValueError(f"this eraser does nothing to the tokens of {concept.name!r}: {list(concept.prompts)}")
    if _effect(deltas, tokens @ null.T @ null) < _LEAST_KEPT * whole:
        raise ValueError(
            f"the {len(guards)} guard prompts take away all that this eraser does to {concept.name!r}; guard fewer"
        )
    a, c = separable_factors(deltas, tokens, null, config.rank)
    c = {name: c.get(name, torch.zeros(len(weight), len(a))).float() for name, weight in weights.items()}
    increment = Increment(a.float(), C=c)
    metrics = {
        **_losses(deltas, increment, tokens, null),
        **_damage(deltas, increment, guarded, weights),
        "source": change.kind,
        "share_representable": change.share_inside,
        "parts_outside": len(change.outside),
        "tensors_unread": len(change.unread),
        "dimensions_left": len(null),
        "seconds": round(time.perf_counter() - started, 3),
    }
    return Entry(concept, increment, config, guards, metrics)


def _losses(deltas: Mapping[str, Tensor], increment: Increment, tokens: Tensor, null: Tensor) -> dict[str, float]:
    projected = tokens @ null.T @ null
    made = {name: increment.C[name].double() @ increment.A.double() for name in deltas}
    whole = _effect(deltas, tokens)
    to_rank = {name: delta.double() - made[name] for name, delta in deltas.items()}
    return {
        "effect_kept": _effect(made, tokens) / whole,
        "effect_lost_to_guards": _effect(deltas, tokens - projected) / whole,
        "effect_lost_to_rank": _effect(to_rank, projected) / whole,
    }


def _damage(
    deltas: Mapping[str, Tensor], increment: Increment, guarded: Tensor, weights: Mapping[str, Tensor]
) -> dict[str, float]:
    made = {name: c.double() @ increment.A.double() for name, c in increment.C.items()}
    original = _effect(weights, guarded)
    return {
        "guard_damage_before": _effect(deltas, guarded) / original,
        "guard_damage_after": _effect(made, guarded) / original,
    }


def _effect(deltas: Mapping[str, Tensor], tokens: Tensor) -> float:
    """‖E ΔWᵀ‖ over all modules side by side."""
    return float(sum((tokens @ delta.double().T).square().sum() for delta in deltas.values())) ** 0.5
