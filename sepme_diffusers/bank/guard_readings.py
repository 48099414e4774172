"""What a bank's increments read of the prompts that they guard, on one pipeline.

    reading of a guard at a door = max over its tokens e and the rows a of A of |e · a| / (‖e‖ ‖a‖)

It is zero, up to rounding, if the bank was made for the pipeline's text encoders. Another text encoder, other weights
in it, an adapter, another tokenizer or padding make it more; a coarser precision makes it a little more. So it says
whether a bank belongs to a pipeline, and what a reading must exceed to count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sepme_diffusers.algebra.rounding import coarseness, rounding_share
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import Outline, exact_guards
from sepme_diffusers.text.encoding import Encoded, encode_doors

# What precision explains of a reading that should be zero: encoders round at every layer, here and where the bank was
# made. Twelve layers in bfloat16 were seen to leave 2.4e-3, in float16 2.8e-4.
_EXPLAINED = 1e-2
MOST_PROMPTS = 16
"""How many guards are encoded at most, beside one for each concept that has none of them."""
MOST_ENTRIES = 256
"""How many entries of a bank are measured at most when it is loaded; others are when they are first erased."""


@dataclass(frozen=True)
class GuardReading:
    """What was measured.

    Args:
        largest: The largest reading of each entry, by its key.
        foreign: {concept: its largest reading} where precision does not explain it.
    """

    largest: Mapping[Any, float]
    foreign: Mapping[str, float]


class GuardReadings:
    """Measures what increments read of their exact guards, of some guards for all.

    Args:
        entries: By any key. Those without an exact guard are passed over.
    """

    def __init__(self, entries: Mapping[Any, Outline]) -> None:
        exact = {key: exact_guards(entry) for key, entry in entries.items()}
        exact = {key: guards for key, guards in exact.items() if guards}
        self.prompts = _chosen(exact.values())
        self._doors: dict[str, list[_Basis]] = {}
        for key, guards in exact.items():
            rows, own = [index for index, prompt in enumerate(self.prompts) if prompt in set(guards)], entries[key]
            for door, a in own.bases.items():
                self._doors.setdefault(door, []).append(_Basis(key, own.guards.own, a, rows))

    def measure(self, pipe: Any, encoded: Encoded | None = None, **settings: Any) -> GuardReading:
        """Measure on a pipeline.

        Args:
            pipe: The pipeline.
            encoded: Its embeddings without settings, if some have been computed already.
            settings: Of its `encode_prompt` (`lora_scale`).

        Raises:
            ValueError: If its embeddings have another width, or it has none for a door at which increments act.
        """
        if not self.prompts:
            return GuardReading({}, {})
        embeddings = encode_doors(pipe, self.prompts, **settings) if encoded is None else encoded.doors(self.prompts)
        if missing := sorted(self._doors.keys() - embeddings.keys()):
            raise ValueError(f"increments act at the doors {missing}, for which this pipeline has no embedding")
        largest: dict[Any, float] = {}
        foreign: dict[str, float] = {}
        for door, bases in self._doors.items():
            for basis, reading in zip(bases, _readings(bases, embeddings[door]), strict=True):
                largest[basis.key] = max(reading, largest.get(basis.key, 0.0))
                stored = rounding_share(basis.A.shape[1], coarseness(basis.A.dtype))
                if not reading <= _EXPLAINED + stored:
                    foreign[basis.concept] = max(round(reading, 4), foreign.get(basis.concept, 0.0))
        return GuardReading(largest, foreign)


@dataclass(frozen=True)
class _Basis:
    """The A of an entry's increment at a door, and which of the prompts are its guards."""

    key: Any
    concept: str
    A: Tensor
    prompts: list[int]


def sampled(banks: Mapping[Any, ConceptBank]) -> dict[tuple[Any, str], Outline]:
    """Return the entries of some banks, by the bank's key and the name; of a bank of very many every n-th."""
    entries: dict[tuple[Any, str], Outline] = {}
    for key, bank in banks.items():
        names = list(bank)
        for name in names[:: max(1, -(-len(names) // MOST_ENTRIES))]:
            entries[key, name] = bank.entries.outline(name)
    return entries


def _chosen(exact: Iterable[Sequence[str]]) -> list[str]:
    """Some of the guards, evenly among all of them with the blank prompt first, and one at least of every entry."""
    exact = list(exact)
    guards = sorted({guard for own in exact for guard in own})
    chosen = guards[:: max(1, -(-len(guards) // MOST_PROMPTS))]
    missed = [own[0] for own in exact if not set(chosen) & set(own)]
    return list(dict.fromkeys(chosen + missed))


def _readings(bases: list[_Basis], embeddings: Tensor) -> list[float]:
    """The largest reading of each basis, of its own guards among embeddings (n_prompts, n_tokens, d)."""
    tokens, d = normalize(embeddings.float().cpu(), dim=-1), embeddings.shape[-1]
    if wrong := [basis.concept for basis in bases if basis.A.shape[1] != d]:
        raise ValueError(f"embeddings here are {d} wide, which is not the width of the increments of {wrong}")
    rows = torch.cat([normalize(basis.A.detach().float().cpu(), dim=-1, eps=1e-12) for basis in bases])
    read = (tokens @ rows.T).abs().amax(dim=1).split([len(basis.A) for basis in bases], dim=-1)
    return [float(part[basis.prompts].max()) for part, basis in zip(read, bases, strict=True)]
