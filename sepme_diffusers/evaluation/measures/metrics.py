"""Pictures from fixed seeds, and what is measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seed: int | Sequence[int] = 0,
    steps: int = 20,
    guidance_scale: float = 4.0,
    batch_size: int = 16,
) -> list[Image.Image]:
    """One picture a prompt; prompt i always starts from the noise of seed + i, or of seed[i] where a list is given."""
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seeds[start + i]) for i in range(len(part))]
        made = pipe(part, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators)
        pictures += made.images
    return pictures


@contextmanager
def erased(pipe: Any, bank: ConceptBank, names: Sequence[str]) -> Iterator[None]:
    """A bank loaded on a pipeline that has none, with these concepts erased, while the block runs."""
    pipe.load_sepme(bank)
    try:
        pipe.set_erased(names)
        yield
    finally:
        pipe.unload_sepme()


def accuracy(probabilities: Tensor, truth: Sequence[str], names: Sequence[str]) -> float:
    """Share of rows of (n, n_names) whose most probable name is the true one, in percent."""
    wanted = torch.tensor([names.index(name) for name in truth])
    return 100 * (probabilities.argmax(dim=1) == wanted).double().mean().item()


def judged(pictures: Sequence[Image.Image], styles: Sequence[str], objects: Sequence[str]) -> tuple[float, float]:
    """Style and object accuracy of pictures of the built-in model, in percent, by its judge."""
    style, object_ = pocket.classify(pictures)
    return accuracy(style, styles, pocket.style_classes), accuracy(object_, objects, pocket.objects)


def style_accuracy(pictures: Sequence[Image.Image], styles: Sequence[str]) -> float:
    """Style accuracy alone, in percent, of pictures that show no particular object."""
    return accuracy(pocket.classify(pictures)[0], styles, pocket.style_classes)


def largest_change(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> int:
    """The largest difference of any channel of any pixel between two sets of pictures, in 255ths."""
    pairs = zip(pictures, others, strict=True)
    return max(int(np.abs(np.int16(first) - np.int16(second)).max()) for first, second in pairs)


def mean_change(pictures: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    """The mean absolute difference of pixels between two sets of pictures, in 255ths."""
    pairs = zip(pictures, others, strict=True)
    return float(np.mean([np.abs(np.int16(first) - np.int16(second)).mean() for first, second in pairs]))
