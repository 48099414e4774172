"""Remembered: what was made of an embedding, for as long as the same tensor comes again.

The text does not change from step to step: pipelines hand the same tensor to every pass of a call. On a GPU, where a
step is bound by the number of small kernels, editing it once per call instead of once per step is what keeps the edit
cheap. A tensor is known by itself (a weak reference, never its address) and by its version, so that one that was
written to is edited anew. What is remembered belongs to one set of what acts, so it can never be that of another set.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Pipelines with two passes per step (guidance apart) alternate between two embeddings.
_ENTRIES = 4
# Of the changes behind Linears, for one embedding: those of Stable Diffusion 1.5 for a batch of a dozen.
_MOST_BYTES = 2**27


@dataclass(eq=False)
class Reading:
    """What per-module increments read of an embedding, and what that changes behind Linears.

    Args:
        values: (e Aᵀ) ⊙ mask ⊙ open(e), (batch, n_tokens, R).
        changes: {module name: what is added there}, as far as it is remembered; None where nothing is.
    """

    values: Tensor
    changes: dict[str, Tensor] | None = None

    def remember(self, name: str, change: Tensor) -> None:
        """Remember what is added at a module, while there is room for it."""
        if self.changes is not None and sum(map(_bytes, self.changes.values())) + _bytes(change) <= _MOST_BYTES:
            self.changes[name] = change


Edited = tuple[dict[str, Tensor], Reading | None]
"""The edited embeddings by door, and what per-module increments read."""


@dataclass(frozen=True)
class _Entry:
    """An edit, the tensors that it was made of, and the versions of all of them: nobody has written to them since."""

    sources: Mapping[str, tuple[weakref.ref[Tensor], int]]
    pictures: int
    edited: Edited
    versions: tuple[int, ...]

    def is_of(self, embeddings: Mapping[str, Tensor], pictures: int) -> bool:
        """Return whether it was made of these tensors as they are now, and is as it was then."""
        if pictures != self.pictures or embeddings.keys() != self.sources.keys():
            return False
        same = (
            source() is embeddings[door] and embeddings[door]._version == version
            for door, (source, version) in self.sources.items()
        )
        return all(same) and _versions(self.edited) == self.versions

    @property
    def is_alive(self) -> bool:
        """Whether its tensors can come again."""
        return all(source() is not None for source, _ in self.sources.values())


@dataclass(eq=False)
class Remembered:
    """The edits of the last few embeddings."""

    entries: tuple[_Entry, ...] = field(default=(), init=False)

    @staticmethod
    def applies(embeddings: Mapping[str, Tensor]) -> bool:
        """Return whether it can be seen that these tensors stay as they are.

        Not while a graph is traced, nor where gradients are taken, nor of inference tensors, which have no version.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        return not torch.is_inference_mode_enabled() and not any(e.is_inference() for e in embeddings.values())

    def recall(self, embeddings: Mapping[str, Tensor], pictures: int) -> Edited | None:
        """Return the edit of these tensors, if they are as they were when it was made."""
        return next((entry.edited for entry in self.entries if entry.is_of(embeddings, pictures)), None)

    def keep(self, embeddings: Mapping[str, Tensor], pictures: int, edited: Edited) -> None:
        """Remember the edit of these tensors."""
        sources = {door: (weakref.ref(embedding), embedding._version) for door, embedding in embeddings.items()}
        alive = [entry for entry in self.entries if entry.is_alive]
        self.entries = (*alive[1 - _ENTRIES :], _Entry(sources, pictures, edited, _versions(edited)))

    def forget(self) -> None:
        """Forget everything."""
        self.entries = ()

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        """Copied and pickled empty."""
        return type(self), ()


def _versions(edited: Edited) -> tuple[int, ...]:
    return tuple(embedding._version for embedding in edited[0].values())


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
