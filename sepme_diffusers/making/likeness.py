"""Likenesses: which of very many prompts is to the text encoder the same as another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Two prompts whose embeddings differ by less than this share are one prompt to the text encoder.
_SAME = 1e-6
# What a product in float32 leaves of the square of a distance, as a share of the squares of the lengths.
_ROUNDED = 1e-5


class Likenesses:
    """One vector for each of very many prompts, by which those that are the same to the text encoder are found.

    It is a weighted sum of the prompt's tokens with weights of length 1. Sums are no farther from each other than the
    wholes, and no two prompts that differ have the same one but by coincidence.

    Args:
        prompts: The first prompts.
        embeddings: Of these, (n_prompts, n_tokens, d).
    """

    def __init__(self, prompts: Sequence[str], embeddings: Tensor) -> None:
        self._prompts: list[str] = []
        self._sums = embeddings[:0, 0].float()
        self._waiting: list[Tensor] = []
        self.update(prompts, embeddings)

    def update(self, prompts: Sequence[str], embeddings: Tensor) -> None:
        """Take in more prompts."""
        self._prompts += prompts
        self._waiting.append(_sums(embeddings))

    def alike(self, embeddings: Tensor, besides: str | None) -> tuple[int, str] | None:
        """Find a prompt that is the same to the text encoder as one of these.

        Args:
            embeddings: (n_prompts, n_tokens, d).
            besides: A prompt that does not count, if any.

        Returns:
            The index of the one, and the prompt; None if there is no such pair.
        """
        if self._waiting:
            self._sums = torch.cat([self._sums, *self._waiting])
            self._squares = self._sums.square().sum(dim=1)
            self._waiting = []
        sums, least = _sums(embeddings), _SAME * embeddings.flatten(1).norm(dim=1)
        squares = sums.square().sum(dim=1, keepdim=True)
        apart = torch.addmm(self._squares, sums, self._sums.T, alpha=-2) + squares
        near = (apart < _ROUNDED * squares + least[:, None] ** 2).nonzero()
        distances = (self._sums[near[:, 1]] - sums[near[:, 0]]).norm(dim=1)
        for own, other in near[distances < least[near[:, 0]]].tolist():
            if self._prompts[other] != besides:
                return own, self._prompts[other]
        return None


def _sums(embeddings: Tensor) -> Tensor:
    """Weighted sums (n_prompts, d) of the tokens, float32; the later ones, which read the others, count most."""
    weights = torch.arange(1, embeddings.shape[1] + 1, device=embeddings.device, dtype=torch.float32).sqrt()
    return torch.einsum("ntd,t->nd", embeddings.float(), weights / weights.norm())
