"""Whether a bank's increments fit a pipeline: its UNet's shape and weights, and its text encoders."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sepme_diffusers.bank import ConceptBank, Entry
from sepme_diffusers.concepts import encode, rows
from sepme_diffusers.targets import projection_shapes, projection_weights

# A bank made for this text encoder leaks no more than its precision allows; one made for another leaks everything.
_FOREIGN_LEAKAGE = 1e-2
# A cast or a fused LoRA changes a weight's norm by less than this share.
_FOREIGN_NORM = 1e-2


def refuse_foreign(pipe: Any, bank: ConceptBank) -> None:
    """Check that a bank's increments fit a pipeline.

    Raises:
        ValueError: If they were made for another width, other weights (per-module increments) or another text encoder.
    """
    refuse_other_base(pipe, bank)
    refuse_other_text(pipe, [bank])


def refuse_other_base(pipe: Any, bank: ConceptBank) -> None:
    """Check that a pipeline's UNet is one that a bank's increments were made for.

    Raises:
        ValueError: If they were made for another width, or other weights (per-module increments).
    """
    shapes = projection_shapes(pipe.unet)
    width = next(iter(shapes.values()))[1]
    if width != bank.base.width:
        raise ValueError(f"the bank is for embeddings of width {bank.base.width}; this pipeline's are {width} wide")
    if any(entry.increment.form == "module" for entry in bank.values()):
        _refuse_other_weights(pipe, bank, {name: d_out for name, (d_out, _) in shapes.items()})


def _refuse_other_weights(pipe: Any, bank: ConceptBank, shapes: dict[str, int]) -> None:
    made_for = {name: d_out for name, (d_out, _) in bank.base.projections.items()}
    norms = {name: float(weight.detach().float().norm()) for name, weight in projection_weights(pipe.unet).items()}
    differ = shapes != made_for or any(
        abs(norms[name] - norm) > _FOREIGN_NORM * norm for name, (_, norm) in bank.base.projections.items()
    )
    if differ:
        raise ValueError(
            f"the bank's per-module increments were made on {bank.base.name!r}; this UNet has other weights. "
            "Text-side increments (solver='closed_form') serve every base with the same text encoder"
        )
    for name, entry in bank.items():
        if entry.increment.C is not None:
            _refuse_other_modules(name, entry, shapes)


def _refuse_other_modules(name: str, entry: Entry, shapes: dict[str, int]) -> None:
    found = {module: len(c) for module, c in entry.increment.C.items()}
    if found != shapes:
        wrong = sorted({module for module, _ in found.items() ^ shapes.items()})
        raise ValueError(f"the increment of {name!r} was made for another base: these modules differ: {wrong}")


def refuse_other_text(pipe: Any, banks: Iterable[ConceptBank]) -> None:
    """Check that the pipeline's text encoders are those that the banks were made with.

    Raises:
        ValueError: If the increments read what their guards should hide from them, or there is no encoder to ask.
    """
    if not _encoders(pipe):
        raise ValueError(
            "the pipeline has no text encoder, so it cannot be seen whether the bank was made for its embeddings; "
            "load the bank first, then drop the encoder"
        )
    leaks = {name: leak for bank in banks for name, leak in _leaks(pipe, bank).items() if not leak <= _FOREIGN_LEAKAGE}
    if leaks:
        raise ValueError(
            "the bank was made for another text encoder than this pipeline's: with this one its increments move "
            f"the prompts that they guard (share of the embedding that they read: {leaks})"
        )


def _leaks(pipe: Any, bank: ConceptBank) -> dict[str, float]:
    """The largest ‖e Aᵀ‖ / (‖e‖ ‖A‖) of a token e of two of its guards, for each concept."""
    asked = {name: list(dict.fromkeys((entry.guards[0], entry.guards[-1]))) for name, entry in bank.items()}
    prompts = list(dict.fromkeys(prompt for guards in asked.values() for prompt in guards))
    embedded = dict(zip(prompts, torch.nn.functional.normalize(encode(pipe, prompts).cpu(), dim=-1), strict=True))
    leaks = {}
    for name, guards in asked.items():
        a = bank[name].increment.A.float()
        read = rows(torch.stack([embedded[prompt] for prompt in guards])) @ (a / a.norm()).T
        leaks[name] = float(read.norm(dim=1).max())
    return leaks


def _encoders(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
    return [encoder for encoder in found if encoder is not None]


def text_state(pipe: Any) -> tuple[tuple[int, int, int], ...]:
    """What changes when a text encoder is swapped, gets adapters or other weights; cheap enough for every call."""
    return tuple(
        (id(encoder), len(parameters), sum(0 if p.is_inference() else p._version for p in parameters))
        for encoder in _encoders(pipe)
        for parameters in [list(encoder.parameters())]
    )
