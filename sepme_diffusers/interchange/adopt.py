"""Other erasers made separable: their change of the weights, without what it does to the guards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from sepme_diffusers.algebra.imitation import imitated, separable_factors
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.compatibility import refuse_other_base, refuse_other_text
from sepme_diffusers.bank.entry import Entry
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.doors.registry import door_linears
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.interchange.weight_change import Source, WeightChange, read_change
from sepme_diffusers.making.embedded import EmbeddedConcept
from sepme_diffusers.making.guards import Guards
from sepme_diffusers.making.kinds.wording import described
from sepme_diffusers.making.measure import LeakageMeter
from sepme_diffusers.making.soft_guards import SoftGuards, as_soft_guards
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.text.concept import BLANK, Concept, as_concepts
from sepme_diffusers.text.encoding import TOKENS, Encoded, rows

Method = Literal["imitate", "project"]

# Below this share of an eraser's effect, or of the concept's embedding, what the guards leave is rounding.
_LEAST_KEPT = 1e-4


def from_lora(
    source: Source,
    pipe: Any,
    concepts: Iterable[Concept | str],
    guards: Sequence[str] = (BLANK,),
    regular: SoftGuards | Sequence[str] = (),
    bank: ConceptBank | None = None,
    config: SepMEConfig | None = None,
    method: Method = "imitate",
    difference: bool = False,
    kind: str | None = None,
) -> ConceptBank:
    """Make a bank from an eraser of another method: a LoRA, or edited weights (ESD, UCE, MACE ...).

    Its change of the text projections is brought into the null space of the guards. Then it is cut to the rank, by
    its effect on the concept's own tokens. From then on it is erased, combined and restored like any other increment,
    and leaves the guarded prompts exactly alone. The same is done with its change of the Linear that reads a further
    door, SDXL's pooled embedding. What it changes elsewhere cannot be kept.

    The entry's metrics say what each step cost. `effect_kept_within_guards` and, after the cut to the rank,
    `effect_kept`: how much of the wanted change of the concept's keys and values is made (1: all of it).
    `guard_damage_before` and `guard_damage_after`: how much of the guarded prompts' keys and values changes. Of
    several doors they give the least effect and the largest damage. `share_representable`: which share of the eraser's
    whole change is of what reads the text; `parts_outside`: how many other modules it changes.

    Args:
        source: Tensors by name, a .safetensors file or a folder with one, see `weight_change.read_change`.
        pipe: The pipeline that the eraser was made for; only read.
        concepts: What it erases. With several, each gets an increment of its own, guarded on the others' names.
        guards: Prompts that must not change, beside the blank one and the other concepts of the bank.
        regular: Regular prompts that should change little, or `SoftGuards`; only where the eraser is imitated.
        bank: The bank to add to; made on the same base.
        config: Its `rank`, `guard_tolerance`, `ridge` and `soft_guard_weight` are used. Default: `linear()`.
        method: "imitate" solves for the edit inside the null space that does to the concept's prompts what the eraser
            does. "project" takes ΔW NᵀN: what the eraser does to any prompt, less what the guards have in common with
            it, which weakens it on the concept too.
        difference: The source's weights are differences, not edited weights.
        kind: Of bare names, see `SepMETrainer.erase`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the settings are to be calibrated, nothing in the source is understood or can be kept, it was
            made for another base, or the guards take away all that it does to a concept.

    Example:
        >>> from sepme_diffusers import SepMEPipeline, export_lora, from_lora, pocket
        >>> pipe = SepMEPipeline.from_pretrained(pocket.path())
        >>> file = export_lora(pocket.bank("styles"), pipe, ["neon"], "neon.safetensors", format="kohya")
        >>> list(from_lora(file, pipe, ["neon"], kind="style"))
        ['neon']
    """
    if method not in get_args(Method):
        raise ValueError(f"no method {method!r}; choose one of {list(get_args(Method))}")
    adopted = as_concepts(concepts, kind)
    config = config or SepMEConfig.linear()
    if config.is_calibrated:
        raise ValueError("an eraser is imitated as it is, and nothing is calibrated: use SepMEConfig.linear()")
    base = SepMETrainer(pipe, config).base()
    if bank is None:
        bank = ConceptBank(base)
    else:
        refuse_other_base(bank, base)
        refuse_other_text(pipe, [bank])
        bank = replace(bank, base=bank.base.completed_by(base))
    further = {name: door.width for name, door in bank.base.doors.items() if name != TOKENS}
    change = read_change(source, pipe.unet, difference, further)
    if not change.inside:
        raise ValueError(
            f"nothing of this eraser can be kept: it leaves attn2.to_k and attn2.to_v as they are and changes "
            f"{len(change.outside) + len(change.further)} other modules, such as "
            f"{[*change.further, *change.outside][:3]}"
        )
    names = dict.fromkeys((*bank, *(concept.name for concept in adopted)))
    encoded = Encoded(pipe)
    worded = [described(concept, pipe, encoded, names) for concept in adopted]
    soft = cast("SoftGuards | None", as_soft_guards(pipe, regular))
    parts = _parts(change, pipe, tuple(dict.fromkeys((BLANK, *guards))), names, soft, config)
    entries = [replace(_entry(each.concept, parts, change, method), concept=each.kept) for each in worded]
    return bank.with_entries(entries)


@dataclass(frozen=True)
class _Part:
    """What an eraser changes at one door.

    Args:
        encoded: Embeddings of prompts there.
        room: The guards there.
        weights: W_m (d_out, d) of the modules that read the door's embedding.
        deltas: ΔW_m (d_out, d) of those that change.
        soft: Returns what moving regular prompts costs for a concept, (d, d); or None.
    """

    encoded: Encoded
    room: Guards
    weights: Mapping[str, Tensor]
    deltas: Mapping[str, Tensor]
    soft: Callable[[Concept], Tensor | None]

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """The embeddings of prompts as rows, (n, d), float64."""
        return rows(self.encoded(prompts)).cpu().double()


def _parts(
    change: WeightChange,
    pipe: Any,
    guards: tuple[str, ...],
    names: Iterable[str],
    soft: SoftGuards | None,
    config: SepMEConfig,
) -> dict[str, _Part]:
    """What the eraser changes, by door; the tokens' first."""
    encoded, names = Encoded(pipe), tuple(names)

    def penalty(concept: Concept, door: str) -> Tensor | None:
        return None if soft is None else soft.without(pipe, concept, door)

    def part(door: str, weights: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> _Part:
        room = Guards.of(encoded.at(door), guards, names, config)
        return _Part(encoded.at(door), room, weights, deltas, partial(penalty, door=door))

    weights = {name: weight.detach().cpu() for name, weight in projection_weights(pipe.unet).items()}
    deltas = {name: delta.cpu() for name, delta in change.inside.items()}
    parts = {TOKENS: part(TOKENS, weights, deltas)}
    for door, delta in change.further.items():
        module, weight = door_linears(pipe.unet)[door]
        read = {module: weight.detach().cpu()[:, : delta.shape[1]]}
        parts[door] = part(door, read, {module: delta.cpu()})
    return parts


def _entry(concept: Concept, parts: Mapping[str, _Part], change: WeightChange, method: Method) -> Entry:
    increments: dict[str, Increment] = {}
    costs: list[dict[str, float]] = []
    for door, part in parts.items():
        if door != TOKENS and not _norm(part.deltas, part.tokens(concept.prompts)):
            continue
        inside, a, c = _separable(concept, part, method)
        increments[door] = _as_increment(door, part, a, c)
        costs.append(_costs(concept, part, inside, increments[door]))
    increment = replace(increments.pop(TOKENS), doors=increments)
    tokens, doors = parts[TOKENS], (TOKENS, *increments)
    n_exact = min(parts[door].room.n_exact for door in doors)
    meter = LeakageMeter({concept.name: increment}, tokens.weights, tokens.room.names[n_exact:])
    guarded = (*tokens.room.hard, *tokens.room.names)
    meter.update(guarded, {door: parts[door].encoded(guarded).cpu() for door in doors})
    metrics = {
        **{name: min(cost[name] for cost in costs) for name in costs[0] if name.startswith("effect")},
        **{name: max(cost[name] for cost in costs) for name in costs[0] if name.startswith("guard")},
        "source": change.kind,
        "method": method,
        "share_representable": change.share_inside,
        "parts_outside": len(change.outside),
        "tensors_unread": len(change.unread),
        "dimensions_left": len(tokens.room.null(concept)),
        **meter.metrics(concept.name),
    }
    return Entry(concept, increment, tokens.room.config, tokens.room.guard_set(n_exact), metrics)


def _separable(concept: Concept, part: _Part, method: Method) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """The changes inside the null space, and their factors A and C_m, cut to the rank."""
    config = part.room.config
    tokens, null = part.tokens(concept.prompts), part.room.null(concept).cpu()
    _refuse_without_effect(concept, part.room.prompts(concept), part.deltas, tokens, null)
    if method == "imitate":
        embedded = EmbeddedConcept.at_door(concept, part.encoded)
        penalty = part.room.penalty(embedded, null, part.soft(concept), cast(float, config.soft_guard_weight))
        inside = imitated(part.deltas, tokens, null, penalty, config.ridge)
    else:
        inside = {name: delta.double() @ null.T @ null for name, delta in part.deltas.items()}
    return inside, *separable_factors(inside, tokens, null, config.rank)


def _as_increment(door: str, part: _Part, a: Tensor, c: Mapping[str, Tensor]) -> Increment:
    """The factors as an increment: per-module for the tokens, and at a further door text-side, B = W⁺ C."""
    if door == TOKENS:
        unchanged = {name: torch.zeros(len(weight), len(a)) for name, weight in part.weights.items()}
        return Increment(a.float(), C={name: c.get(name, zeros).float() for name, zeros in unchanged.items()})
    ((module, weight),) = part.weights.items()
    return Increment(a.float(), B=(torch.linalg.pinv(weight.double()) @ c[module]).float())


def _costs(concept: Concept, part: _Part, inside: Mapping[str, Tensor], increment: Increment) -> dict[str, float]:
    tokens, guarded = part.tokens(concept.prompts), part.tokens(part.room.prompts(concept))
    changes = {name: delta.double() for name, delta in increment.delta_weights(part.weights).items()}
    original = _norm(part.weights, guarded)
    return {
        "effect_kept_within_guards": _kept(inside, part.deltas, tokens),
        "effect_kept": _kept(changes, part.deltas, tokens),
        "guard_damage_before": _norm(part.deltas, guarded) / original,
        "guard_damage_after": _norm(changes, guarded) / original,
    }


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
