"""A bank of a few hundred numbers, both forms, for tests that read or write one thousands of times."""

from __future__ import annotations

import torch

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.text.concept import Concept

WIDTH, RANK = 8, 2
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
            SepMEConfig(rank=RANK, steps_per_batch=1),  # as in the banks of all versions
            ("", *(other for other in increments if other != name)),
            {"leakage": 1e-8, "leakage_of": {}, "seconds": 0.5, "note": "é"},
        )
        for name, increment in increments.items()
    }
    return ConceptBank(BaseModel("tiny", WIDTH, 4, PROJECTIONS), entries, always=("neon",))
