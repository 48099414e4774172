"""Sheets of pictures that show what a bank does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.bank.card import Picture
from sepme_diffusers.text.spelling import slug


def card_pictures(
    pipe: Any, bank: ConceptBank, prompts: Mapping[str, str] | None = None, seed: int = 0, **call: Any
) -> tuple[Picture, ...]:
    """Draw pictures for a bank's card: for each concept before, erased and restored, from the same noise.

    Args:
        pipe: A pipeline with `load_sepme`, and no bank loaded.
        bank: The bank. It is loaded while the pictures are drawn.
        prompts: {concept: the prompt to draw}. Default: of the bank's first three concepts, the first prompt that each
            brings, or its name.
        seed: Of the noise.
        call: Passed on to the pipeline: `num_inference_steps`, `guidance_scale`, ...

    Raises:
        ValueError: If a bank is loaded.
        KeyError: If the bank lacks a concept.
    """
    if pipe.erasable:
        raise ValueError("unload_sepme() first: the pictures before an erasure are the plain model's")
    prompts = prompts or {name: (*bank[name].concept.prompts, name)[0] for name in list(bank)[:3]}
    # What a policy always erases could not be shown restored, nor the bank be unloaded.
    pipe.load_sepme(replace(bank.subset([*prompts, *bank.always]), always=()))
    try:
        return tuple(
            picture for name, prompt in prompts.items() for picture in _moments(pipe, name, prompt, seed, call)
        )
    finally:
        pipe.unload_sepme()


def _moments(pipe: Any, name: str, prompt: str, seed: int, call: Mapping[str, Any]) -> list[Picture]:
    """A concept's pictures before it is erased, erased, and restored."""
    pictures = []
    for moment, erased in (("before", []), ("erased", [name]), ("restored", [])):
        generator = torch.Generator().manual_seed(seed)
        image = pipe(prompt, erased=erased, generator=generator, **call).images[0]
        pictures.append(Picture(f"{slug(name)}-{moment}", f"{prompt} ({moment})", image))
    return pictures
