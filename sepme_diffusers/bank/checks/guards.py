"""Whether a bank fits a pipeline, and how far it moves the prompts that it guards there."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.checks.folder import Found
from sepme_diffusers.bank.compatibility import has_per_module, refuse_other_weights
from sepme_diffusers.bank.entries import Entries
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.leakage import leakage
from sepme_diffusers.text.encoding import TOKENS, encode_doors

# What a guarded prompt's projections may move by; and where the text encoder's weights were rounded to half precision,
# which moves a sound bank's by up to 1.4 %.
_EXACT, _ROUNDED = 1e-4, 2e-2
# Guards of banks of more than so many concepts are measured for so many of them, unless it is said for how many.
_MANY, _SAMPLE = 1000, 100


@dataclass(frozen=True)
class Measured:
    """What a pipeline tells of a bank.

    Args:
        faults: Why the bank does not fit the pipeline.
        by_concept: {concept: what is wrong with its guards}.
        leaks: {concept: {guarded prompt: leakage}}.
        notes: What could not be checked, and why.
    """

    faults: Sequence[str] = ()
    by_concept: Mapping[str, Sequence[str]] = field(default_factory=dict)
    leaks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def check_guards(pipe: Any, found: Found, sample: int | None) -> Measured:
    """Check that a bank fits a pipeline, and measure how far it moves guarded prompts there.

    Args:
        pipe: Only read.
        found: The bank.
        sample: See `verify`.
    """
    if found.base is None:
        return Measured()
    if fault := _base_fault(pipe, found.base, found.entries):
        return Measured(faults=[fault])
    many = sample is None and len(found.entries) > _MANY
    chosen = _choose_guards(found.entries, _SAMPLE if many else sample)
    exact = _in_float32(pipe)
    leaks = _measure_leaks(exact, found.entries, chosen)
    again = {name: chosen[name] for name in found.solved_again if name in chosen}
    faults: dict[str, Iterable[str]] = {
        name: _guard_faults(found.entries[name], of_guard, _tolerance(pipe)) for name, of_guard in leaks.items()
    }
    for name, of_guard in _measure_leaks(exact, found.solved_again, again).items():
        faults[name] = [*_adapter_leak_faults(found.solved_again[name], of_guard), *faults.get(name, [])]
    notes = _precision_notes(pipe, leaks)
    if len(chosen) < len(found.entries):
        notes = [f"the guards of {len(chosen)} concepts were measured, chosen at random (see sample=)", *notes]
    return Measured((), {name: list(of_concept) for name, of_concept in faults.items()}, leaks, notes)


def _base_fault(pipe: Any, base: BaseModel, entries: Mapping[str, Entry]) -> str | None:
    bank, weights = ConceptBank(base, Entries(entries)), _weights(pipe)
    if not weights:
        return (
            "per-module increments need a pipeline with its denoiser to be checked" if has_per_module(bank) else None
        )
    try:
        refuse_other_weights(bank, weights)
    except ValueError as error:
        return str(error)
    return None


def _weights(pipe: Any) -> dict[str, Tensor]:
    """The text projections of the pipeline's denoiser; none where it has no denoiser."""
    return {} if pipe.unet is None else projection_weights(pipe.unet)


def _choose_guards(entries: Mapping[str, Entry], sample: int | None) -> dict[str, list[str]]:
    """Choose whose guards are measured, and which; those that are moved with their worst cases."""
    if sample is None:
        return {name: list(entry.guards) for name, entry in entries.items()}
    chosen = {}
    for name in sorted(random.sample(list(entries), min(sample, len(entries)))):
        guards, damped = entries[name].guards, list(entries[name].guards.damped)
        listed = [guard for guard in entries[name].metrics.get("leakage_of", {}) if guard in guards]
        others = random.sample(damped, min(sample, len(damped)))
        chosen[name] = list(dict.fromkeys((*guards.exact, *listed, *others)))
    return chosen


def _measure_leaks(
    pipe: Any, entries: Mapping[str, Entry], chosen: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Measure the leakage of guards of concepts, by the pipeline's text encoders and weights.

    Args:
        pipe: The pipeline.
        entries: By concept.
        chosen: {concept: its guards that are measured}.
    """
    if getattr(pipe, "text_encoder", None) is None:
        raise ValueError("the pipeline has no text encoder, so its guards cannot be recomputed")
    prompts = list(dict.fromkeys(prompt for guards in chosen.values() for prompt in guards))
    if not prompts:
        return {}
    weights, embeddings = _weights(pipe), encode_doors(pipe, prompts)
    if missing := {door for entry in entries.values() for door in entry.increment.doors} - embeddings.keys():
        raise ValueError(f"increments act at the doors {sorted(missing)}, for which the pipeline has no embedding")
    places, leaks = {prompt: place for place, prompt in enumerate(prompts)}, {}
    for name, guards in chosen.items():
        if guards:
            of_guards = {door: rows[[places[guard] for guard in guards]] for door, rows in embeddings.items()}
            measured = leakage(entries[name].increment, of_guards[TOKENS], weights, further=of_guards)
            leaks[name] = dict(zip(guards, measured.tolist(), strict=True))
    return leaks


def _in_float32(pipe: Any) -> Any:
    """Return the pipeline, or where it encodes text in half precision, a light copy that does so in float32."""
    if not _is_half(pipe):
        return pipe
    copied = copy.copy(pipe)
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(pipe, name, None) is not None:
            # Past the pipeline's own bookkeeping, which both share.
            vars(copied)[name] = copy.deepcopy(getattr(pipe, name)).float()
    return copied


def _is_half(pipe: Any) -> bool:
    return torch.finfo(pipe.text_encoder.dtype).bits < 32


def _tolerance(pipe: Any) -> float:
    return _ROUNDED if _is_half(pipe) else _EXACT


def _precision_notes(pipe: Any, leaks: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Say what half precision cannot tell, where something moves by more than a float32 encoder would allow."""
    largest = max((leak for of_concept in leaks.values() for leak in of_concept.values()), default=0.0)
    if not leaks or not _is_half(pipe) or largest <= _EXACT:
        return []
    return [
        f"the pipeline's text encoder is in {pipe.text_encoder.dtype}: rounded weights move guards by up to "
        f"{largest:.2g}, so nothing below {_ROUNDED:g} was found a fault; load it in float32 to check to {_EXACT:g}"
    ]


def _adapter_leak_faults(entry: Entry, leaks: Mapping[str, float]) -> Iterator[str]:
    prompt, leak = max(leaks.items(), key=lambda pair: pair[1])
    # Of half precision, it moves a guard by up to some thousandths where the increment leaves it alone.
    if not leak <= max(_ROUNDED, 2 * entry.metrics["leakage"]):
        yield f"its adapter moves the guarded prompt {prompt!r} by {leak:.2g} of its projections"


def _guard_faults(entry: Entry, leaks: Mapping[str, float], tolerance: float) -> Iterator[str]:
    claimed = dict.fromkeys(entry.guards.damped, entry.metrics.get("leakage_rest", 0.0))
    claimed |= entry.metrics.get("leakage_of", {})
    what = "embedding" if entry.form == "text" else "projections"
    for prompt, leak in leaks.items():
        # A leak that the bank states in its metrics is no fault; twice as much is.
        if not leak <= max(tolerance, 2 * claimed.get(prompt, 0.0)):
            yield f"it moves the guarded prompt {prompt!r} by {leak:.2g} of its {what}"
