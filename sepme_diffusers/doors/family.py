"""Family: by which arguments text enters a denoiser, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from sepme_diffusers.text.encoding import POOLED, TOKENS

__all__ = ["POOLED", "TOKENS", "Door", "Family"]


@dataclass(frozen=True)
class Door:
    """An argument of a denoiser's forward that carries text.

    Args:
        name: What the bank calls it: "tokens" for an embedding of shape (rows, n_tokens, d), "pooled" for one of shape
            (rows, d).
        argument: The argument; "argument.key" where it is a dictionary.
        optional: A pass may leave it out.
        linear: The Linear of the denoiser that is the first and only one to read a further door's embedding, in its
            first columns. By it an edit at the door can be written as a change of weights. Default: there is none.
    """

    name: str
    argument: str
    optional: bool = False
    linear: str | None = None


@dataclass(frozen=True)
class Family:
    """Denoisers that read text in the same way.

    Args:
        name: Of the family.
        denoisers: Class names; subclasses belong to the family too.
        doors: Where text enters; the first is the one that every increment edits.
        entry: A submodule that every pass runs, by which a pass that went round the doors is noticed.
        sample: The argument that holds one row per picture.
        auxiliary: It helps another denoiser (a ControlNet) and draws nothing by itself.
        linears: Finds the Linears that read the text and nothing else, by module name, where the family has such. Only
            these can carry per-module increments.
        reference: Where the architecture is described.
    """

    name: str
    denoisers: tuple[str, ...]
    doors: tuple[Door, ...]
    entry: str
    sample: str = "sample"
    auxiliary: bool = False
    linears: Callable[[nn.Module], Mapping[str, nn.Module]] | None = None
    reference: str = ""
