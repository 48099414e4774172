"""Every variant of the method, and every baseline, on the same styles with the same prompts and guards."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from sepme_diffusers.evaluation.protocols.erasures import GUARDS, concepts_of, preserved_prompts
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.loop import Step
from sepme_diffusers.making.regular import regular_guards
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.pocket.vocabulary import BANKED_STYLES
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
    """Makes variants, all from the same prompts, guards and regular prompts.

    Args:
        pipe: The built-in model's pipeline.
        on_step: Called after every training step.
    """

    def __init__(self, pipe: Any, on_step: Callable[[Step], None] | None = None) -> None:
        self.pipe, self.on_step = pipe, on_step
        self.concepts = concepts_of(pipe, "styles", STYLES)
        self.regular = regular_guards(pipe)

    def bank(self, config: SepMEConfig, concepts: Sequence[Concept] = ()) -> Edit:
        """Make a bank.

        Args:
            config: The settings.
            concepts: The styles, otherwise described than by the prompts of their kind.
        """
        trainer = SepMETrainer(self.pipe, config, GUARDS, self.regular, BANKED_STYLES, self.on_step)
        bank = trainer.erase(concepts or self.concepts)
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
        """Let a baseline erase the styles and preserve the guards and regular prompts."""
        return Edit(baseline.edit(self.pipe, self.concepts, (*GUARDS, *preserved_prompts(self.pipe, STYLES))))


def _two_templates() -> list[Concept]:
    """Describe the styles as in docs/training.md, by pairs of prompts."""
    templates, without = ["a cat in the style of {concept}", "{concept} cat"], ["a cat", "cat"]
    return [Concept.from_template(style, templates, without) for style in STYLES]


# A thousand pictures of a hundred steps for each concept would take hours here. So would a thousand training steps at
# the paper's beta, which is for a wider model and hardly moves this one.
_FEW: dict[str, Any] = {"n_images": 24, "image_steps": 20, "batch_size": 8}
# The paper's learning rate and threshold are for a model two hundred times as large: here it would not move.
_UNCONSTRAINED = SepMEConfig.unconstrained(learning_rate=1e-4, relative=True, tolerance=0.02, max_steps=300, **_FEW)


def _linear(**settings: Any) -> Callable[[VariantMaker], Edit]:
    """A variant without gates: settings beside those of `SepMEConfig.linear`."""
    return lambda maker: maker.bank(SepMEConfig.linear(**settings))


def _against_blank(**settings: Any) -> Callable[[VariantMaker], Edit]:
    """The same, with each prompt paired with the blank prompt, as in the paper. Anchors stay, so the basis does."""

    def make(maker: VariantMaker) -> Edit:
        concepts = [
            replace(concept, pairs=tuple((prompt, BLANK) for prompt in concept.prompts), anchors=concept.anchors)
            for concept in maker.concepts
        ]
        return maker.bank(SepMEConfig.linear(**settings), concepts)

    return make


# To add a variant, list it here; a baseline is listed in `baselines.registry`.
VARIANTS: dict[str, Callable[[VariantMaker], Edit]] = {
    "the default": lambda maker: maker.bank(SepMEConfig()),
    "the default, two templates of a user's own": lambda maker: maker.bank(SepMEConfig(), concepts=_two_templates()),
    "the default, then trained": lambda maker: maker.bank(SepMEConfig(solver="closed_form+train")),
    "the paper's constants": lambda maker: maker.bank(SepMEConfig.paper(max_steps=200, **_FEW)),
    "full basis, prompt pairs": _linear(solver="train", basis="full"),
    "full basis, against the blank prompt": _against_blank(solver="train", basis="full"),
    "aligned basis, prompt pairs": _linear(solver="train"),
    "aligned basis, new noise each step": _linear(solver="train", steps_per_batch=1),
    "aligned basis, against the blank prompt": _against_blank(solver="train"),
    "aligned basis, text-side": _linear(solver="train", parametrisation="text"),
    "closed form, without a gate": _linear(),
    "closed form, then trained": _linear(solver="closed_form+train"),
    "joint": _linear(solver="train", coupling="joint"),
    "unconstrained": VariantMaker.unconstrained,
    **{name: partial(VariantMaker.baseline, baseline=baseline) for name, baseline in BASELINES.items()},
}


def make(maker: VariantMaker, name: str) -> tuple[Edit, float]:
    """Make a variant; also the seconds that it took."""
    started = time.perf_counter()
    edit = VARIANTS[name](maker)
    return edit, time.perf_counter() - started
