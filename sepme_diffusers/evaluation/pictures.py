"""Pictures from fixed seeds, each drawn once, with or without erasures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image

from sepme_diffusers import pocket
from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.probes import Probe
from sepme_diffusers.increment.increment import Increment
from sepme_diffusers.runtime.pipeline import SepMEPipeline


def built_in() -> SepMEPipeline:
    """Load the built-in model's pipeline, without its progress bar."""
    pipe = SepMEPipeline.from_pretrained(pocket.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seed: int | Sequence[int] = 0,
    steps: int = 20,
    guidance_scale: float = 4.0,
    batch_size: int = 16,
    erased: Sequence[Sequence[str]] | None = None,
) -> list[Image.Image]:
    """Draw one picture per prompt, each from noise of its own that does not depend on the batch.

    Args:
        pipe: The pipeline.
        prompts: What to draw.
        seed: Prompt i starts from the noise of seed + i, or of seed[i] where a list is given.
        steps: Denoising steps per picture.
        guidance_scale: Of classifier-free guidance.
        batch_size: Pictures per call.
        erased: What is erased for each picture. Default: what is erased now.
    """
    seeds = range(seed, seed + len(prompts)) if isinstance(seed, int) else seed
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        batch = list(prompts[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seeds[start + i]) for i in range(len(batch))]
        chosen = {} if erased is None else {"erased": erased[start : start + batch_size]}
        output = pipe(batch, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generators, **chosen)
        pictures += output.images
    return pictures


@contextmanager
def erased(pipe: Any, bank: ConceptBank, names: Sequence[str]) -> Iterator[None]:
    """Load a bank on a pipeline that has none, and erase these concepts, while the block runs."""
    pipe.load_sepme(bank)
    try:
        pipe.set_erased(names)
        yield
    finally:
        pipe.unload_sepme()


class PictureCache:
    """Draws pictures of a pipeline under any erased set, and remembers them, so that none is drawn twice.

    Args:
        pipe: The pipeline, with at most one bank loaded whenever it draws.
        steps: Denoising steps per picture.
        guidance: Of classifier-free guidance.
    """

    def __init__(self, pipe: Any, steps: int = 20, guidance: float = 4.0) -> None:
        self.pipe, self.steps, self.guidance = pipe, steps, guidance
        self._pictures: dict[tuple[frozenset[Increment], str, int], Image.Image] = {}

    def draw(self, probes: Sequence[Probe]) -> list[list[Image.Image]]:
        """Draw the pictures of each probe under the erasures that are active now."""
        bank = self.pipe.get_bank()
        active = frozenset(bank[name].increment for name in self.pipe.erased) if bank is not None else frozenset()
        cases = dict.fromkeys(case for probe in probes for case in probe.cases)
        missing = [case for case in cases if (active, *case) not in self._pictures]
        if missing:
            prompts, seeds = zip(*missing, strict=True)
            pictures = generate(self.pipe, prompts, seeds, self.steps, self.guidance)
            self._pictures |= {(active, *case): picture for case, picture in zip(missing, pictures, strict=True)}
        return [[self._pictures[active, prompt, seed] for prompt, seed in probe.cases] for probe in probes]
