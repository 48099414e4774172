"""Prompts as the embeddings that a pipeline's denoiser reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.text.concept import Concept


@torch.no_grad()
def encode(pipe: Any, prompts: Sequence[str], batch_size: int = 64) -> Tensor:
    """Encode prompts as the pipeline's cross-attention reads them: e(c), (n_prompts, n_tokens, d), float32.

    Args:
        pipe: A pipeline with `encode_prompt` (Stable Diffusion 1.x, 2.x, SDXL and their relatives).
        prompts: The prompts; padded or cut to the text encoder's length, as at inference.
        batch_size: Prompts encoded at a time.
    """
    parts = [list(prompts[start : start + batch_size]) for start in range(0, len(prompts), batch_size)]
    device = pipe._execution_device
    with device:  # tokenizers make tensors on torch's default device
        embeds = [
            pipe.encode_prompt(part, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
            for part in parts
        ]
    return torch.cat(embeds).float()


class Encoded:
    """Embeddings of prompts, each encoded once.

    Args:
        pipe: A pipeline, see `encode`.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._known: dict[str, Tensor] = {}

    def __call__(self, prompts: Iterable[str]) -> Tensor:
        """e(c) for each prompt, (n_prompts, n_tokens, d)."""
        prompts = list(prompts)
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
            self._known.update(zip(new, encode(self._pipe, new), strict=True))
        return torch.stack([self._known[prompt] for prompt in prompts])

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self._pipe._execution_device

    def anchors(self, concept: Concept) -> Tensor:
        """The mean embedding of each pair's anchors, (n_pairs, n_tokens, d)."""
        return torch.stack([self(prompts).mean(dim=0) for prompts in concept.anchors])


def rows(embeddings: Tensor) -> Tensor:
    """Embeddings (n_prompts, n_tokens, d) as token rows (n_prompts * n_tokens, d)."""
    return embeddings.flatten(0, -2)


@torch.no_grad()
def encode_doors(pipe: Any, prompts: Sequence[str], **settings: Any) -> dict[str, Tensor]:
    """Encode prompts for every door: {"tokens": (n, n_tokens, d)}, and "pooled": (n, 1, d_pooled) where there is one.

    Draws no random numbers and leaves the pipeline as it is.

    Args:
        pipe: A pipeline with `encode_prompt`.
        prompts: The prompts.
        settings: Of `encode_prompt` (`clip_skip`, `lora_scale`).
    """
    device = pipe._execution_device
    with device:  # tokenizers make tensors on torch's default device
        found = pipe.encode_prompt(
            list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False, **settings
        )
    doors = {"tokens": found[0].float()}
    # Stable Diffusion XL gives (tokens, negative tokens, pooled, negative pooled).
    if len(found) == 4 and found[2] is not None:
        doors["pooled"] = found[2].float()[:, None]
    return doors
