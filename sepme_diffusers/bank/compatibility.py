"""Whether a bank's increments fit a base: the shape and weights of its text projections, and its text encoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import Entry
from sepme_diffusers.bank.fingerprint import Fingerprint
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.encoding import TOKENS, encode_doors

# A bank made for this text encoder leaks no more than its precision allows; one made for another leaks everything.
_FOREIGN_LEAKAGE = 1e-2


def refuse_other_weights(bank: ConceptBank, weights: Mapping[str, Tensor]) -> None:
    """Check that a bank's increments fit the text projections of a base.

    Args:
        bank: The bank.
        weights: W_m (d_out, d) by module name, see `doors.linears.projection_weights`.

    Raises:
        ValueError: If they were made for another width, other modules, or other weights (per-module increments).
    """
    made_on, per_module = bank.base, {n: entry for n, entry in bank.items() if entry.increment.form == "module"}
    if reason := made_on.fingerprint.text_side.differs(Fingerprint(next(iter(weights.values())).shape[1])):
        raise ValueError(f"the bank was made on {made_on.name!r}, and this is another base: {reason}")
    if per_module and (reason := made_on.fingerprint.differs(Fingerprint.of_weights(weights))):
        raise ValueError(
            f"this UNet has other weights than {made_on.name!r}, for which its per-module increments were made: "
            f"{reason}. Text-side increments (solver='closed_form') serve every base with the same text encoder"
        )
    for name, entry in per_module.items():
        try:
            entry.increment.refuse_other_modules(weights)
        except ValueError as error:
            raise ValueError(f"{name!r}: {error}") from error


def refuse_other_text(pipe: Any, banks: Iterable[ConceptBank]) -> None:
    """Check that the pipeline's text encoders are those that the banks were made with.

    Raises:
        ValueError: If the increments read what their guards should hide from them, a concept leaves no guard by which
            this could be seen, there is no encoder to ask, or none for a door at which increments act.
    """
    banks = list(banks)
    if not _encoders(pipe):
        raise ValueError(
            "the pipeline has no text encoder, so it cannot be seen whether the bank was made for its embeddings; "
            "load the bank first, then drop the encoder"
        )
    if unknown := [name for bank in banks for name, entry in bank.items() if entry.guards and not _exact(entry)]:
        raise ValueError(
            f"{unknown}: every guard is listed in metrics.leakage_of as not exact, so it cannot be seen whether the "
            "bank was made for this pipeline's text encoder; make these concepts again with a guard that is exact"
        )
    leaks = {name: leak for bank in banks for name, leak in _leaks(pipe, bank).items() if not leak <= _FOREIGN_LEAKAGE}
    if leaks:
        raise ValueError(
            "the bank was made for another text encoder than this pipeline's: with this one its increments move "
            f"the prompts that they guard (share of the embedding that they read: {leaks})"
        )


def _leaks(pipe: Any, bank: ConceptBank) -> dict[str, float]:
    """The largest ‖e Aᵀ‖ / (‖e‖ ‖A‖) of a token e of two of its exact guards, at any door, for each concept."""
    exact = {name: _exact(entry) for name, entry in bank.items()}
    asked = {name: {guards[0], guards[-1]} for name, guards in exact.items() if guards}
    if not asked:
        return {}
    prompts = sorted(set().union(*asked.values()))
    shares = _shares({name: bank[name].increment for name in asked}, encode_doors(pipe, prompts))
    return {name: max(shares[name][prompts.index(guard)] for guard in guards) for name, guards in asked.items()}


def _shares(increments: Mapping[str, Increment], embeddings: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """What each increment reads of each prompt, the largest of its doors."""
    doors: dict[str, dict[str, Tensor]] = {}
    for name, increment in increments.items():
        for door, part in {TOKENS: increment, **increment.doors}.items():
            doors.setdefault(door, {})[name] = part.A.float()
    if missing := doors.keys() - embeddings.keys():
        raise ValueError(f"increments act at the doors {sorted(missing)}, for which this pipeline has no embedding")
    largest: dict[str, Tensor] = {}
    for door, bases in doors.items():
        for name, share in _read(bases, embeddings[door]).items():
            largest[name] = torch.maximum(share, largest.get(name, share))
    return {name: share.tolist() for name, share in largest.items()}


def _read(bases: Mapping[str, Tensor], embeddings: Tensor) -> dict[str, Tensor]:
    """The largest ‖e Aᵀ‖ / (‖e‖ ‖A‖) of a token e of each prompt, (n_prompts,), for each A, in one product for all."""
    tokens = torch.nn.functional.normalize(embeddings.cpu(), dim=-1)
    read = (tokens @ torch.cat([a / a.norm() for a in bases.values()]).T).split([len(a) for a in bases.values()], -1)
    return {name: part.norm(dim=-1).amax(dim=-1) for name, part in zip(bases, read, strict=True)}


def _exact(entry: Entry) -> list[str]:
    """The guards that an entry leaves exactly alone."""
    return [guard for guard in entry.guards if guard not in entry.metrics.get("leakage_of", {})]


def _encoders(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    return [encoder for encoder in found if encoder is not None]


def text_state(pipe: Any) -> tuple[tuple[int, int, int], ...]:
    """Describe the text encoders: another one, an adapter or other weights change it. Cheap enough for every call."""
    return tuple(
        (id(encoder), len(parameters), sum(0 if p.is_inference() else p._version for p in parameters))
        for encoder in _encoders(pipe)
        for parameters in [list(encoder.parameters())]
    )
