"""Vocabularies: what a pipeline's text encoders know of tokens, to see textual inversions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepme_diffusers.doors.attachment import ErasureNotInForce


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one text encoder.

    Args:
        tokens: The length of its tokenizer; 0 without one.
        rows: The rows of its embedding.
        checksum: Of the embedding's numbers.
    """

    tokens: int
    rows: int
    checksum: str


@dataclass(frozen=True)
class Vocabularies:
    """The vocabularies of a pipeline's text encoders as they were at one moment.

    Args:
        by_encoder: {component: its vocabulary}.
    """

    by_encoder: dict[str, Vocabulary]

    @classmethod
    def of(cls, pipe: Any) -> Vocabularies:
        """Take the vocabularies of a pipeline as they are now."""
        encoders = {
            name: part
            for name, part in pipe.components.items()
            if name.startswith("text_encoder") and isinstance(part, nn.Module)
        }
        tokenizers = {name: getattr(pipe, name.replace("text_encoder", "tokenizer"), None) for name in encoders}
        return cls({name: _vocabulary(encoder, tokenizers[name]) for name, encoder in encoders.items()})

    def refuse_others(self, pipe: Any) -> None:
        """Check that no token of a pipeline was added to a vocabulary since, and none overwritten.

        Raises:
            ErasureNotInForce: If one was, with the text encoder.
        """
        now = Vocabularies.of(pipe).by_encoder
        names = sorted({*self.by_encoder, *now})
        if changed := [name for name in names if self.by_encoder.get(name) != now.get(name)]:
            raise ErasureNotInForce(
                f"the bank was loaded with strict=True, and the vocabulary of {changed} has changed since (a textual "
                "inversion?): whether its tokens hold an erased concept cannot be seen. Unload them, or "
                "load_sepme(..., allow_embeddings=True)"
            )


def _vocabulary(encoder: nn.Module, tokenizer: Any) -> Vocabulary:
    embedding: Any = encoder
    weight = embedding.get_input_embeddings().weight
    return Vocabulary(0 if tokenizer is None else len(tokenizer), len(weight), _checksum(weight))


@torch.no_grad()
def _checksum(weight: Tensor) -> str:
    """Of every row: an overwritten vector bumps no version where it is written through `.data`."""
    rows = torch.stack(
        [weight.sum(dim=1, dtype=torch.float32), torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)]
    )
    return hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()
