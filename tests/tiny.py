"""A bank of a few hundred numbers, both forms, for tests that read or write one thousands of times."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.bank.fingerprint import Encoding
from sepme_diffusers.bank.guard_sets import GuardSet
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import TOKENS

WIDTH, RANK, N_TOKENS = 8, 2, 4
PROJECTIONS = {"mid.attn2.to_k": (4, 2.5), "mid.attn2.to_v": (6, 3.0)}


def tiny_bank(seed: int = 0) -> ConceptBank:
    """A text-side and a per-module increment, of random numbers; equal for equal seeds."""
    torch.manual_seed(seed)
    c = {name: torch.randn(d_out, RANK) for name, (d_out, _) in PROJECTIONS.items()}
    increments = {
        "neon": Increment(torch.randn(RANK, WIDTH), B=torch.randn(WIDTH, RANK)),
        "Van Gogh": Increment(torch.randn(RANK, WIDTH), C=c),
    }
    entries = {
        name: Entry(
            Concept(name, ((f"a cat, {name}", "a cat"),)),
            increment,
            SepMEConfig(rank=RANK),
            GuardSet(("", *increments)),
            {"leakage": 1e-8, "leakage_of": {}, "seconds": 0.5, "note": "é"},
        )
        for name, increment in increments.items()
    }
    base = BaseModel("tiny", {TOKENS: Encoding(WIDTH, N_TOKENS)}, projections=PROJECTIONS)
    return ConceptBank(base, entries, always=("neon",))


def crowd(names: Iterable[str], guards: GuardSet | None = None, rank: int = 1, seed: int = 0) -> ConceptBank:
    """Many text-side increments that guard all names, one shared wording among them."""
    names = list(names)
    guards = GuardSet(("",), tuple(names)) if guards is None else guards
    torch.manual_seed(seed)
    a, b = torch.randn(len(names), rank, WIDTH).half(), torch.randn(len(names), WIDTH, rank).half()
    entries = {
        name: Entry(
            Concept.from_template(name, "a cat, {concept}", "a cat"),
            Increment(a[i], B=b[i]),
            SepMEConfig(rank=rank),
            guards,
            {"leakage": 0.01, "reach": 0.5},
        )
        for i, name in enumerate(names)
    }
    return ConceptBank(BaseModel("tiny", {TOKENS: Encoding(WIDTH, N_TOKENS)}), entries)
