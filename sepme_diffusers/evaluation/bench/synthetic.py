"""Banks of random increments, as fast and as large as real ones, and what they take."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sepme_diffusers.algebra.subspace import null_space
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.entry import BaseModel, Entry
from sepme_diffusers.bank.fingerprint import Fingerprint, heights_and_norms
from sepme_diffusers.bank.guard_sets import GuardSet
from sepme_diffusers.doors.linears import projection_weights
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.runtime.pipeline import SepMEPipeline
from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import encode, rows

RANK = 8


def synthetic_bank(pipe: SepMEPipeline, size: int, form: str, guards: Sequence[str] = ("",)) -> ConceptBank:
    """Make a bank of small random increments in the guards' null space, for concepts c0, c1, ...

    Args:
        pipe: The base.
        size: How many.
        form: "text" for text-side increments, "module" for per-module ones.
        guards: The guarded prompts.
    """
    weights = projection_weights(pipe.unet)
    d = next(iter(weights.values())).shape[1]
    shapes = heights_and_norms(weights)
    null = null_space(rows(encode(pipe, guards)).cpu()).float()
    draw = torch.Generator().manual_seed(0)

    def factor(*shape: int) -> Tensor:
        return 1e-3 * torch.randn(*shape, generator=draw)

    def increment() -> Increment:
        a = factor(RANK, len(null)) @ null
        if form == "text":
            return Increment(a, B=factor(d, RANK))
        return Increment(a, C={name: factor(d_out, RANK) for name, (d_out, _) in shapes.items()})

    guard_set = GuardSet(tuple(guards))
    entries = [Entry(Concept(f"c{index}"), increment(), SepMEConfig(), guard_set) for index in range(size)]
    text = Fingerprint.of_text(pipe)
    base = BaseModel("random weights", text.doors, text.vocabularies, shapes)
    return ConceptBank(base).with_entries(entries)


def alike_prompts(pipe: SepMEPipeline, count: int) -> list[str]:
    """Write different prompts as long as the text encoder takes, alike but for the end: they leave a null space."""
    start = "a " * (pipe.tokenizer.model_max_length - 8)
    return [f"{start}c{index}" for index in range(count)]


def in_half_precision(bank: ConceptBank) -> ConceptBank:
    """Load the bank as it comes back from `save_pretrained(dtype=torch.float16)`."""
    with tempfile.TemporaryDirectory() as folder:
        bank.save_pretrained(Path(folder) / "bank", torch.float16)
        return ConceptBank.from_pretrained(Path(folder) / "bank")


def sizes_on_disk(bank: ConceptBank) -> tuple[int, int]:
    """Count the bytes of tensor files, per concept, and of the whole folder, with B and C in float16."""
    with tempfile.TemporaryDirectory() as folder:
        bank.save_pretrained(Path(folder) / "bank", torch.float16)
        files = {path: path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()}
    tensors = sum(size for path, size in files.items() if path.suffix == ".safetensors")
    return tensors // len(bank), sum(files.values())
