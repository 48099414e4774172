"""LeakageMeter: how far increments move prompts that they should leave alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.algebra.rounding import rounding_share
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.increment.leakage import MOST_LISTED, leakage, leakage_metrics, least_opening, output_norms
from sepme_diffusers.text.encoding import TOKENS

# How many numbers are computed at a time.
_AT_A_TIME = 2**24

Embeddings = Mapping[str, Tensor]
"""{door: (n_prompts, n_tokens, d)}"""


class LeakageMeter:
    """Measures many increments on prompts that come in batches; of each it remembers the worst.

    One product tells what all text-side increments read of a batch. Where that leaves a gate shut there is nothing
    more to compute.

    Args:
        increments: {name: increment}; what an increment does to the prompt of its own name does not count.
        weights: W_m (d_out, d) of the denoiser by module name, for per-module increments.
        damped: The prompts that are not guarded exactly. What leaks of them is no rounding, so float32 will do.
    """

    def __init__(
        self,
        increments: Mapping[str, Increment],
        weights: Mapping[str, Tensor] | None = None,
        damped: Iterable[str] = (),
    ) -> None:
        self._increments, self._weights, self._to_damp = dict(increments), weights, frozenset(damped)
        self._places = {name: place for place, name in enumerate(increments)}
        self._exact: list[dict[str, float]] = [{} for _ in increments]
        self._worst = torch.zeros(len(increments), 0, dtype=torch.float64)
        self._worst_prompts = torch.zeros(len(increments), 0, dtype=torch.int64)
        self._damped: list[str] = []
        self._shut = torch.zeros(len(increments), dtype=torch.float64)
        self._readers: dict[torch.dtype, list[_Readers]] = {}

    def update(self, prompts: Sequence[str], embeddings: Embeddings) -> None:
        """Measure on more guards.

        Args:
            prompts: The guards.
            embeddings: Of these, by door.
        """
        for take, damped in ((self._update_exact, False), (self._update_damped, True)):
            chosen = [index for index, prompt in enumerate(prompts) if (prompt in self._to_damp) == damped]
            if chosen:
                take([prompts[index] for index in chosen], {door: e[chosen] for door, e in embeddings.items()})

    def _update_exact(self, prompts: Sequence[str], embeddings: Embeddings) -> None:
        leaks, _ = self._moved(prompts, embeddings, torch.float64)
        places = leaks.nonzero()
        for (place, index), leak in zip(places.tolist(), leaks[places.unbind(1)].tolist(), strict=True):
            self._exact[place][prompts[index]] = leak

    def _update_damped(self, prompts: Sequence[str], embeddings: Embeddings) -> None:
        leaks, shut = self._moved(prompts, embeddings, torch.float32)
        self._shut = torch.maximum(self._shut, shut.amax(dim=1))
        numbers = torch.arange(len(self._damped), len(self._damped) + len(prompts)).expand(len(leaks), -1)
        self._damped += prompts
        leaks = torch.cat([self._worst, leaks], dim=1)
        self._worst, kept = leaks.topk(min(MOST_LISTED + 1, leaks.shape[1]), dim=1)
        self._worst_prompts = torch.cat([self._worst_prompts, numbers], dim=1).gather(1, kept)

    def largest(self, name: str) -> float:
        """Return the largest leakage of an increment on the guards so far; 0 for none."""
        return float(self.metrics(name)["leakage"])

    def metrics(self, name: str) -> dict[str, Any]:
        """Return the metrics of an increment: those of `leakage_metrics`, and `gate_share` if damped guards have one.

        `gate_share` is the largest share of its gate that is read by a damped guard which leaves it shut.
        """
        place = self._places[name]
        pairs = zip(self._worst[place].tolist(), self._worst_prompts[place].tolist(), strict=True)
        leaks = leakage_metrics(self._exact[place], [(leak, self._damped[number]) for leak, number in pairs])
        return leaks | ({"gate_share": round(float(self._shut[place]), 3)} if self._shut[place] else {})

    def _moved(self, prompts: Sequence[str], embeddings: Embeddings, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The leakage of each increment on each prompt, and the share of a shut gate that it reads.

        Both are (n_increments, n_prompts), float64, and zero for the prompt of an increment's own name.
        """
        tokens = embeddings[TOKENS]
        leaks, shut = torch.zeros(2, len(self._increments), len(tokens), dtype=torch.float64)
        for readers in self._readers_of(dtype):
            moved = readers.moved(embeddings[readers.door])
            for all_of, part in zip((leaks, shut), moved, strict=True):
                all_of[readers.places] = torch.maximum(all_of[readers.places], part)
        per_module = [(place, i) for place, i in enumerate(self._increments.values()) if i.form == "module"]
        norms = output_norms(tokens, self._weights) if per_module and self._weights else None
        for place, increment in per_module:
            leaks[place] = leakage(increment, tokens, self._weights, norms, embeddings)
            shut[place] = _share_of_shut_gates(increment, embeddings)
        for index, prompt in enumerate(prompts):
            if (own := self._places.get(prompt)) is not None:
                leaks[own, index] = shut[own, index] = 0
        return leaks, shut

    def _readers_of(self, dtype: torch.dtype) -> list[_Readers]:
        """What reads a batch in this precision: text-side increments by door, rank, gate and coarseness."""
        if dtype not in self._readers:
            groups: dict[tuple[str, int, bool, float], list[tuple[int, Increment]]] = {}
            for place, increment in enumerate(self._increments.values()):
                parts = {TOKENS: increment, **increment.doors} if increment.form == "text" else {}
                for door, part in parts.items():
                    key = door, part.rank, part.gate is not None, part.coarseness
                    groups.setdefault(key, []).append((place, part))
            self._readers[dtype] = [_Readers(door, parts, dtype) for (door, *_), parts in groups.items()]
        return self._readers[dtype]


class _Readers:
    """Text-side increments of one rank at one door, all with a gate or all without one, as one matrix.

    Args:
        door: The door.
        parts: (place of the increment among all, what it does at the door).
        dtype: In which prompts are read.
    """

    def __init__(self, door: str, parts: Sequence[tuple[int, Increment]], dtype: torch.dtype) -> None:
        self.door, self.places = door, torch.tensor([place for place, _ in parts])
        self._parts = [part for _, part in parts]
        self._gated, self._coarseness = self._parts[0].gate is not None, self._parts[0].coarseness
        a = torch.stack([part.A.detach().cpu().double() for part in self._parts])
        self._lengths = a.norm(dim=-1).to(dtype)
        self._a = a.flatten(0, 1).to(dtype)
        if self._gated:
            self._gates = torch.tensor([part.gate for part in self._parts], dtype=dtype)
        else:
            # With B = Q F, Q orthonormal columns, ‖B a‖ = ‖F a‖: by r numbers, not d.
            b = torch.stack([part.B.detach().cpu().double() for part in self._parts if part.B is not None])
            self._factors = torch.linalg.qr(b).R.to(dtype)

    def moved(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return what each does to prompts (n_prompts, n_tokens, d), see `LeakageMeter._moved`."""
        step = max(1, _AT_A_TIME // (embeddings.shape[1] * len(self._a)))
        parts = [self._largest(part.cpu().to(self._a.dtype)) for part in embeddings.split(step)]
        largest = torch.cat(parts).T
        if not self._gated:
            return largest.double(), torch.zeros(largest.shape, dtype=torch.float64)
        leaks = torch.zeros(largest.shape, dtype=torch.float64)
        opened = largest > least_opening(self._gates)[:, None]
        for place in opened.any(dim=1).nonzero().flatten().tolist():
            leaks[place, opened[place]] = leakage(replace(self._parts[place], doors={}), embeddings[opened[place]])
        return leaks, (largest / self._gates[:, None]).masked_fill(opened, 0.0).double()

    def _largest(self, tokens: Tensor) -> Tensor:
        """What a token of each prompt is read at most, or without gates moved at most, (n_prompts, n_increments)."""
        n_prompts, n_tokens, d = tokens.shape
        if not self._gated:
            tokens = tokens / tokens.norm(dim=-1, keepdim=True)
        read = (tokens.flatten(0, 1) @ self._a.T).view(n_prompts, n_tokens, *self._lengths.shape)
        if not self._gated:
            if self._coarseness:
                read.masked_fill_(read.abs() <= rounding_share(d, self._coarseness) * self._lengths, 0.0)
            one = read.shape[-1] == 1
            read = read * self._factors[:, 0] if one else torch.einsum("ntis,irs->ntir", read, self._factors)
        # The root of the largest square, for what fewer passes over the numbers do.
        return read.square_().sum(dim=-1).amax(dim=1).sqrt_()


def _share_of_shut_gates(increment: Increment, embeddings: Embeddings) -> Tensor:
    """The largest share of a gate that prompts read which leave it shut, of all doors, (n_prompts,), float64."""
    shares = [torch.zeros(len(embeddings[TOKENS]), dtype=torch.float64)]
    for door, part in {TOKENS: increment, **increment.doors}.items():
        if part.gate is not None:
            reading = part.reading(embeddings[door]).cpu()
            shares.append((reading / part.gate).masked_fill(reading > least_opening(part.gate), 0.0))
    return torch.stack(shares).amax(dim=0)
