"""Prompts as the embeddings that a pipeline's denoiser reads."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.text.alignment import aligned_rows
from sepme_diffusers.text.concept import BLANK, Concept

# The doors for which a pipeline encodes text.
TOKENS, POOLED = "tokens", "pooled"
# The bytes of embeddings that are remembered: some thousand prompts of Stable Diffusion 1.x.
_REMEMBERED = 2**28
# The prompts that an encoder is given at a time.
_TOGETHER = 64


@torch.no_grad()
def encode_doors(
    pipe: Any,
    prompts: Iterable[str],
    batch_size: int = _TOGETHER,
    dtype: torch.dtype | None = torch.float32,
    **settings: Any,
) -> dict[str, Tensor]:
    """Encode prompts for every door: {"tokens": (n, n_tokens, d)}, and "pooled": (n, 1, d_pooled) where there is one.

    The embeddings are on the pipeline's device. No random numbers are drawn, and the pipeline stays as it is.

    Args:
        pipe: A pipeline with `encode_prompt` (Stable Diffusion 1.x, 2.x, SDXL and their relatives).
        prompts: The prompts, at least one; padded or cut to the text encoder's length, as at inference.
        batch_size: How many prompts are encoded at a time.
        dtype: Of the embeddings; None for the one in which the pipeline hands them to its denoiser.
        settings: Further arguments of `encode_prompt` (`clip_skip`, `lora_scale`).
    """
    prompts = list(prompts)
    parts = [
        _encode_together(pipe, prompts[start : start + batch_size], settings)
        for start in range(0, len(prompts), batch_size)
    ]
    doors = {door: torch.cat([part[door] for part in parts]) for door in parts[0]}
    return doors if dtype is None else {door: embeddings.to(dtype) for door, embeddings in doors.items()}


def _encode_together(pipe: Any, prompts: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Tensor]:
    device = pipe._execution_device
    with device:  # tokenizers make tensors on torch's default device
        encodings = pipe.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, **settings
        )
    doors = {TOKENS: encodings[0]}
    # Stable Diffusion XL gives (tokens, negative tokens, pooled, negative pooled).
    if len(encodings) == 4 and isinstance(encodings[2], Tensor) and encodings[2].ndim == 2:
        doors[POOLED] = encodings[2][:, None]
    return doors


def encode(pipe: Any, prompts: Iterable[str], batch_size: int = _TOGETHER) -> Tensor:
    """Encode prompts as e(c), which the pipeline's cross-attention reads: (n_prompts, n_tokens, d), float32.

    Args:
        pipe: A pipeline, see `encode_doors`.
        prompts: The prompts.
        batch_size: How many prompts are encoded at a time.
    """
    return encode_doors(pipe, prompts, batch_size)[TOKENS]


class Encoded:
    """Embeddings of prompts at one door, each prompt encoded once for all doors while it is remembered.

    Args:
        pipe: A pipeline, see `encode_doors`.
        remembered: The bytes of embeddings that are kept; those that were not asked for the longest go first.

    Attributes:
        door: The door; `at` gives another one's embeddings.
    """

    def __init__(self, pipe: Any, remembered: int = _REMEMBERED) -> None:
        self._pipe, self.door = pipe, TOKENS
        self._known = _Remembered(remembered)

    def __call__(self, prompts: Iterable[str]) -> Tensor:
        """Return e(c) for each prompt, (n_prompts, n_tokens, d); a pooled embedding counts as one token."""
        prompts = list(prompts)
        known = self._encode(prompts)
        return torch.stack([known[prompt][self.door] for prompt in prompts])

    def doors(self, prompts: Iterable[str]) -> dict[str, Tensor]:
        """Return the embeddings of prompts at every door, as `encode_doors` does."""
        prompts = list(prompts)
        return {door: self.at(door)(prompts) for door in (TOKENS, *self.further_doors)}

    def prefetch(self, prompts: Iterable[str]) -> None:
        """Encode prompts together that will be asked for one after the other, if all of them can be remembered."""
        prompts = list(dict.fromkeys(prompts))
        if not self._known.each:
            self._encode(prompts[:_TOGETHER])
        if self._known.has_room_for(len(prompts)):
            self._encode(prompts)

    @property
    def further_doors(self) -> tuple[str, ...]:
        """The doors beside the tokens at which the pipeline gives an embedding."""
        return tuple(door for door in self._encode([BLANK])[BLANK] if door != TOKENS)

    def at(self, door: str) -> Encoded:
        """Return the embeddings of the same prompts at another door.

        Raises:
            ValueError: If the pipeline gives none there.
        """
        if door not in (TOKENS, *self.further_doors):
            raise ValueError(
                f"the pipeline gives no embedding at the door {door!r}; it has {[TOKENS, *self.further_doors]}"
            )
        embeddings = copy.copy(self)
        embeddings.door = door
        return embeddings

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self._pipe._execution_device

    def anchors(self, concept: Concept) -> tuple[Tensor, Tensor]:
        """Return what each token of a concept's prompts is mapped to, (n_pairs, n_tokens, d), and which tokens count.

        The tokens of prompts and anchors are matched by words, see `aligned_rows`; of several anchors it is the mean.
        A word that an anchor lacks has nothing to be mapped to: it does not count, (n_pairs, n_tokens) of bool.
        """
        pairs = [
            self._anchor(prompt, anchors) for (prompt, _), anchors in zip(concept.pairs, concept.anchors, strict=True)
        ]
        return torch.stack([mapped for mapped, _ in pairs]), torch.stack([counted for _, counted in pairs])

    def _anchor(self, prompt: str, anchors: Sequence[str]) -> tuple[Tensor, Tensor]:
        own, mapped = self([prompt])[0], []
        counted = torch.ones(len(own), dtype=torch.bool, device=own.device)
        tokenizer = getattr(self._pipe, "tokenizer", None) if self.door == TOKENS else None
        for anchor, embedding in zip(anchors, self(anchors), strict=True):
            matched = aligned_rows(tokenizer, prompt, anchor, len(own))
            lacking = torch.tensor([row is None for row in matched], device=own.device)
            mapped.append(embedding[[0 if row is None else row for row in matched]].where(~lacking[:, None], own))
            counted &= ~lacking
        return torch.stack(mapped).mean(dim=0), counted

    def _encode(self, prompts: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        """Return {prompt: {door: embedding}}."""
        found = {prompt: known for prompt in prompts if (known := self._known.get(prompt)) is not None}
        if unknown := [prompt for prompt in dict.fromkeys(prompts) if prompt not in found]:
            doors = encode_doors(self._pipe, unknown)
            for index, prompt in enumerate(unknown):
                # A copy of its own, which does not keep the others of its batch in memory.
                found[prompt] = {door: embeddings[index].clone() for door, embeddings in doors.items()}
                self._known.put(prompt, found[prompt])
        return found


class _Remembered:
    """Embeddings by prompt and door, up to so many bytes."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self.each = 0  # the bytes of one prompt's embeddings, once there is one
        self._known: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def get(self, prompt: str) -> dict[str, Tensor] | None:
        if prompt in self._known:
            self._known.move_to_end(prompt)
        return self._known.get(prompt)

    def put(self, prompt: str, doors: dict[str, Tensor]) -> None:
        self._known[prompt] = doors
        self.each = sum(embedding.nbytes for embedding in doors.values())
        self._held += self.each
        while self._held > self._most:
            self._known.popitem(last=False)
            self._held -= self.each

    def has_room_for(self, count: int) -> bool:
        return count * self.each <= self._most


def rows(embeddings: Tensor) -> Tensor:
    """Embeddings (n_prompts, n_tokens, d) as token rows (n_prompts * n_tokens, d)."""
    return embeddings.flatten(0, -2)
