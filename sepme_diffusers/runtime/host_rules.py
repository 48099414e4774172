"""What a strict host refuses from a caller while something is erased: embeddings and image prompts of their own.

Increments act on what a prompt reads like. One inverted token brings a concept back in every picture that was tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepme_diffusers.doors.attachment import ErasureNotInForce


def refuse_callers_embeddings(asked: Mapping[str, Any]) -> None:
    """Check that a call brings no embeddings.

    Raises:
        ErasureNotInForce: If it does, with their names.
    """
    given = [name for name, value in asked.items() if name.endswith("prompt_embeds") and value is not None]
    if given:
        raise ErasureNotInForce(
            f"the bank was loaded with strict=True, and the call brings embeddings of its own ({given}): whether they "
            "hold an erased concept cannot be seen. Give a prompt, or load_sepme(..., allow_embeddings=True)"
        )
    if "prompt_embeds" in (asked.get("callback_on_step_end_tensor_inputs") or ()):
        raise ErasureNotInForce(
            "the bank was loaded with strict=True, and a callback may put embeddings of its own in the place of the "
            "prompt's (callback_on_step_end_tensor_inputs has 'prompt_embeds')"
        )


def refuse_image_prompts(asked: Mapping[str, Any]) -> None:
    """Check that a call brings no image prompts, on which increments do not act.

    Raises:
        ErasureNotInForce: If it does, with their names.
    """
    if given := [name for name, value in asked.items() if name.startswith("ip_adapter_image") and value is not None]:
        raise ErasureNotInForce(
            f"the bank was loaded with strict=True, and the call brings image prompts ({given}), on which increments "
            "do not act. Leave them out, or load_sepme(..., allow_images=True)"
        )


@dataclass(frozen=True)
class Inversions:
    """The vocabularies of a pipeline's text encoders as they were when a bank was loaded.

    Args:
        vocabularies: For each text encoder the length of its tokenizer, and the rows and a checksum of its embedding.
    """

    vocabularies: tuple[tuple[str, int, int, str], ...]

    @classmethod
    def of(cls, pipe: Any) -> Inversions:
        """The vocabularies of a pipeline as they are now."""
        found = []
        for name, encoder in pipe.components.items():
            if not name.startswith("text_encoder") or not isinstance(encoder, nn.Module):
                continue
            tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
            weight = encoder.get_input_embeddings().weight
            found.append((name, 0 if tokenizer is None else len(tokenizer), len(weight), _checksum(weight)))
        return cls(tuple(found))

    def refuse_others(self, pipe: Any) -> None:
        """Check that no token was added to a vocabulary, and none overwritten.

        Raises:
            ErasureNotInForce: If one was, with the text encoder.
        """
        if changed := [name for (name, *_), _ in set(_pairs(self, Inversions.of(pipe)))]:
            raise ErasureNotInForce(
                f"the bank was loaded with strict=True, and the vocabulary of {sorted(changed)} has changed since (a "
                "textual inversion?): whether its tokens hold an erased concept cannot be seen. Unload them, or "
                "load_sepme(..., allow_embeddings=True)"
            )


def _pairs(before: Inversions, now: Inversions) -> list[tuple[Any, Any]]:
    old, new = ({vocabulary[0]: vocabulary for vocabulary in one.vocabularies} for one in (before, now))
    return [(old.get(name, (name,)), new.get(name)) for name in {*old, *new} if old.get(name) != new.get(name)]


@torch.no_grad()
def _checksum(weight: Tensor) -> str:
    """Of every row: an overwritten vector bumps no version where it is written through `.data`."""
    rows = torch.stack([weight.detach().float().sum(dim=1), weight.detach().float().square().sum(dim=1)])
    return hashlib.sha256(rows.cpu().numpy().tobytes()).hexdigest()
