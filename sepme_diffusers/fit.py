"""Whether a bank fits a base: the embedding's width, the weights and the text encoder that it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sepme_diffusers.concepts import encode, rows

if TYPE_CHECKING:
    from sepme_diffusers.bank import ConceptBank

# A bank made for this text encoder leaks no more than its precision allows; one made for another leaks everything.
_FOREIGN_LEAKAGE = 1e-2
_SAME_NORM = 1e-2


def refuse_other_weights(bank: ConceptBank, weights: Mapping[str, Tensor]) -> None:
    """Raise unless the bank was made for these text projections.

    Args:
        bank: The bank.
        weights: W_m by module name, see `targets.projection_weights`.

    Raises:
        ValueError: If the widths differ, or per-module increments were made on other weights.
    """
    width = next(iter(weights.values())).shape[1]
    if width != bank.base.width:
        raise ValueError(f"the bank is for embeddings of width {bank.base.width}; this base's are {width} wide")
    if all(entry.increment.form == "text" for entry in bank.values()):
        return
    norms = {name: (len(weight), float(weight.detach().float().norm())) for name, weight in weights.items()}
    expected = bank.base.projections
    if set(norms) != set(expected) or any(
        norms[name][0] != d_out or abs(norms[name][1] - norm) > _SAME_NORM * norm
        for name, (d_out, norm) in expected.items()
    ):
        raise ValueError(
            f"the bank's per-module increments were made on {bank.base.name!r}; this UNet has other weights. "
            "Text-side increments (solver='closed_form') serve every base with the same text encoder"
        )


def refuse_other_text_encoder(bank: ConceptBank, pipe: Any) -> None:
    """Raise unless the pipeline's text encoder keeps the guarded prompts out of the increments' sight.

    Raises:
        ValueError: If a guarded prompt is read by an increment; names the concepts.
    """
    leaks = {name: leak for name, leak in guard_leakage(bank, pipe).items() if leak > _FOREIGN_LEAKAGE}
    if leaks:
        raise ValueError(
            "the bank was made for another text encoder than this pipeline's: with this one its increments move "
            f"the prompts that they guard (share of the embedding that they read: {leaks})"
        )


def guard_leakage(bank: ConceptBank, pipe: Any) -> dict[str, float]:
    """The largest ‖e Aᵀ‖ / (‖e‖ ‖A‖) of a guarded token e, for each concept."""
    prompts = list(dict.fromkeys(prompt for entry in bank.values() for prompt in entry.guards))
    embedded = dict(zip(prompts, torch.nn.functional.normalize(encode(pipe, prompts).cpu(), dim=-1), strict=True))
    leaks = {}
    for name, entry in bank.items():
        a = entry.increment.A.float().cpu()
        read = rows(torch.stack([embedded[prompt] for prompt in entry.guards])) @ (a / a.norm()).T
        leaks[name] = float(read.norm(dim=1).max())
    return leaks
