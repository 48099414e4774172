"""The built-in model: a small Stable Diffusion trained on emoji art, its judge and its concept banks.

It draws `objects` in `styles`, 64 x 64 pixels, in about a tenth of a second on two cores: real enough to see an
erasure work, small enough to ship. How it was made: examples/pocket and docs/pocket.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.pocket.judge import Judge
from sepme_diffusers.pocket.vocabulary import OBJECTS, PLAIN, STYLES

styles: tuple[str, ...] = tuple(STYLES)
objects: tuple[str, ...] = tuple(OBJECTS)
style_classes: tuple[str, ...] = (*styles, PLAIN)

_HERE = Path(__file__).parent


def path(which: Literal["base", "variant"] = "base") -> Path:
    """Return the folder of the base pipeline, or of a second UNet alone: "a fine-tune of the base".

    Raises:
        ValueError: On any other name.

    Example:
        >>> from diffusers import StableDiffusionPipeline, UNet2DConditionModel
        >>> pipe = StableDiffusionPipeline.from_pretrained(path())
        >>> pipe.unet = UNet2DConditionModel.from_pretrained(path("variant"))
    """
    if which not in ("base", "variant"):
        raise ValueError(f"the built-in models are 'base' and 'variant', not {which!r}")
    return _HERE / ("model" if which == "base" else "variant")


def bank(name: Literal["styles", "objects"]) -> ConceptBank:
    """Load the shipped bank that erases styles, or the one that erases objects.

    Raises:
        ValueError: On any other name.
    """
    if name not in ("styles", "objects"):
        raise ValueError(f"the built-in banks are 'styles' and 'objects', not {name!r}")
    return ConceptBank.from_pretrained(_HERE / "banks" / name)


@torch.no_grad()
def classify(images: Sequence[Image.Image] | Tensor) -> tuple[Tensor, Tensor]:
    """Judge pictures: probabilities of the style (n, len(style_classes)) and of the object (n, len(objects)).

    The judge was trained on real pictures alone, never on generated ones.

    Args:
        images: PIL pictures of 64 x 64, or a tensor (n, 3, 64, 64) in [0, 1].

    Raises:
        ValueError: If the pictures are not 64 x 64.
    """
    styles, objects_shown = zip(*(load_judge()(part) for part in as_tensor(images).split(64)), strict=True)
    return torch.cat(styles).softmax(dim=1), torch.cat(objects_shown).softmax(dim=1)


def as_tensor(images: Sequence[Image.Image] | Tensor) -> Tensor:
    """Turn pictures into what the judge reads: (n, 3, 64, 64) in [0, 1], float32 on the CPU.

    Raises:
        ValueError: If the pictures are not 64 x 64.
    """
    if not isinstance(images, Tensor):
        stacked = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
        images = torch.from_numpy(stacked / 255).permute(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
        raise ValueError(f"the judge looks at pictures (n, 3, 64, 64), not {tuple(images.shape)}")
    return images.float().cpu()


@cache
def load_judge() -> Judge:
    """Load the judge, in evaluation mode, once."""
    judge = Judge(len(style_classes), len(objects)).eval()
    judge.load_state_dict(load_file(_HERE / "judge.safetensors"))
    return judge
