"""Every variant of the method, and every baseline, on the same styles with the same prompts and guards."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.baselines.baseline import Baseline, replaced
from sepme_diffusers.evaluation.baselines.registry import BASELINES
from sepme_diffusers.evaluation.pictures import erased
from sepme_diffusers.evaluation.protocols.eraser import GATED
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.loop import Step
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.pocket.concepts import BANKED_STYLES, GUARDS, regular_for_styles, style_concept
from sepme_diffusers.text.concept import BLANK, Concept

STYLES = ("neon", "woodcut")


@dataclass(frozen=True)
class Edit:
    """What a variant makes.

    Args:
        product: A bank, or changed weights {parameter name: weight}.
        steps: Training steps, of all styles together.
    """

    product: ConceptBank | Mapping[str, Tensor]
    steps: int = 0

    @property
    def kilobytes(self) -> float:
        """What it takes on disk, in float32: the increments' own files, or the weights."""
        if not isinstance(self.product, ConceptBank):
            return sum(weight.nbytes for weight in self.product.values()) / 1e3
        with tempfile.TemporaryDirectory() as folder:
            self.product.save_pretrained(Path(folder) / "bank", torch.float32, adapters=False)
            files = (Path(folder) / "bank").rglob("*.safetensors")
            return sum(file.stat().st_size for file in files) / 1e3

    @contextmanager
    def in_force(self, pipe: Any) -> Iterator[None]:
        """Erase `STYLES` on a pipeline while the block runs."""
        product = self.product
        with erased(pipe, product, STYLES) if isinstance(product, ConceptBank) else replaced(pipe.unet, product):
            yield


class VariantMaker:
    """Makes variants, all from the same prompts, guards and soft guards.

    Args:
        pipe: The built-in model's pipeline.
        on_step: Called after every training step.
    """

    def __init__(self, pipe: Any, on_step: Callable[[Step], None] | None = None) -> None:
        self.pipe, self.on_step = pipe, on_step
        self.concepts = [style_concept(style) for style in STYLES]
        self.soft = tuple(p for p in regular_for_styles(STYLES[0]) if p in set(regular_for_styles(STYLES[1])))

    def bank(self, against_blank: bool = False, **settings: Any) -> Edit:
        """Make a bank.

        Args:
            against_blank: Compare each prompt with the blank prompt, as in the paper.
            settings: Fields of SepMEConfig.
        """
        concepts = [_against_blank(concept) for concept in self.concepts] if against_blank else self.concepts
        trainer = SepMETrainer(
            self.pipe, SepMEConfig.linear(**settings), GUARDS, self.soft, BANKED_STYLES, self.on_step
        )
        bank = trainer.erase(concepts)
        return Edit(bank, sum(entry.metrics.get("steps", 0) for entry in bank.values()))

    def unconstrained(self) -> Edit:
        """Train the weights of every cross-attention, with nothing guarded."""
        taken: dict[str, int] = {}

        def on_step(step: Step) -> None:
            taken[step.concept] = step.step
            if self.on_step is not None:
                self.on_step(step)

        weights = SepMETrainer(self.pipe, _UNCONSTRAINED, on_step=on_step).erase_permanently(self.concepts)
        return Edit(weights, sum(taken.values()))

    def baseline(self, baseline: Baseline) -> Edit:
        """Let a baseline erase the styles and preserve what the others guard, softly or not."""
        return Edit(baseline.edit(self.pipe, self.concepts, (*GUARDS, *self.soft)))


def _against_blank(concept: Concept) -> Concept:
    """Pair prompts as the paper does, with the blank prompt. Anchors stay, so the basis is the same."""
    return replace(concept, pairs=tuple((prompt, BLANK) for prompt in concept.prompts), anchors=concept.anchors)


# The paper's learning rate and threshold are for a model two hundred times as large: here it would not move.
_UNCONSTRAINED = SepMEConfig.unconstrained(learning_rate=1e-4, relative=True, tolerance=0.02, max_steps=300)

# To add a variant, list it here; a baseline is listed in `baselines.registry`.
VARIANTS: dict[str, Callable[[VariantMaker], Edit]] = {
    "the paper's constants": lambda maker: maker.bank(**SepMEConfig.paper().to_dict()),
    "full basis, prompt pairs": lambda maker: maker.bank(basis="full"),
    "full basis, against the blank prompt": lambda maker: maker.bank(against_blank=True, basis="full"),
    "aligned basis, prompt pairs": lambda maker: maker.bank(),
    "aligned basis, new noise each step": lambda maker: maker.bank(steps_per_batch=1),
    "aligned basis, against the blank prompt": lambda maker: maker.bank(against_blank=True),
    "aligned basis, text-side": lambda maker: maker.bank(parametrisation="text"),
    "closed form": lambda maker: maker.bank(solver="closed_form"),
    "closed form, with a gate": lambda maker: maker.bank(**GATED["styles"].to_dict()),
    "closed form, then trained": lambda maker: maker.bank(solver="closed_form+train"),
    "joint": lambda maker: maker.bank(coupling="joint"),
    "unconstrained": VariantMaker.unconstrained,
    **{name: partial(VariantMaker.baseline, baseline=baseline) for name, baseline in BASELINES.items()},
}


def make(maker: VariantMaker, name: str) -> tuple[Edit, float]:
    """Make a variant; also the seconds that it took."""
    started = time.perf_counter()
    edit = VARIANTS[name](maker)
    return edit, time.perf_counter() - started
