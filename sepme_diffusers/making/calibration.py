"""Gates calibrated in text space: between what a concept's own prompts read and what regular prompts read."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sepme_diffusers.increment.increment import Increment

# Of so many prompts on, every fifth is held out: the increment is not made for it.
_ENOUGH, _EVERY = 10, 5
# A gate stays this share below what the concept's own prompts read, whatever regular prompts read.
_HIGHEST = 0.9


def made_for(n_prompts: int) -> list[int]:
    """Return the indices of the prompts that an increment is made for; the others are held out for its gate.

    Args:
        n_prompts: How many prompts show the concept. None is held out of fewer than ten.
    """
    held_out = set(range(_EVERY - 1, n_prompts, _EVERY)) if n_prompts >= _ENOUGH else set()
    return [index for index in range(n_prompts) if index not in held_out]


def distinct_rows(embeddings: Tensor) -> Tensor:
    """Return the token rows of prompts, each once, (m, d): the first row, and those of a template, repeat in all.

    Args:
        embeddings: Of prompts, (n_prompts, n_tokens, d).
    """
    return torch.unique(embeddings.flatten(0, -2), dim=0)


def calibrated(increment: Increment, own: Tensor, regular: Tensor) -> tuple[Increment, dict[str, float]]:
    """Set the gate in the middle between the least reading of own prompts and the largest of regular prompts.

    Where regular prompts read nearly as much as own ones, or more, the gate stays below its own prompts: the concept
    is erased, and what else is touched can be seen from the figures.

    Args:
        increment: Text-side or per-module; gates of further doors stay as they are.
        own: Embeddings of the concept's own prompts, held-out ones included, (n_prompts, n_tokens, d).
        regular: Token rows of regular prompts, (m, d), see `distinct_rows`.

    Returns:
        The increment with its gate, and the metrics `own_reading` and `regular_reading`.

    Raises:
        ValueError: If it reads nothing in one of its own prompts.
    """
    least = float(increment.reading(own).min())
    a = increment.A.to(regular)
    most = float((regular @ a.T).norm(dim=-1).max())
    gate = min((least + most) / 2, _HIGHEST * least)
    return replace(increment, gate=gate), {"own_reading": least, "regular_reading": most}
