"""How the evaluation makes its increments: settings, prompts, guards and anchors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sepme_diffusers.bank.bank import ConceptBank
from sepme_diffusers.evaluation.probes import Kind
from sepme_diffusers.increment.config import SepMEConfig
from sepme_diffusers.making.soft_guards import SoftGuards
from sepme_diffusers.making.trainer import SepMETrainer
from sepme_diffusers.pocket.concepts import (
    BANKED_OBJECTS,
    BANKED_STYLES,
    GUARDS,
    object_concept,
    regular_for_styles,
    regular_prompts,
    style_concept,
)
from sepme_diffusers.text.concept import Concept

_GATED = SepMEConfig(solver="closed_form", rank=1, soft_guard_weight=100.0, gain=1.0, gate=0.6, name_weight=0.0)
# An increment reads less in other wordings of an object than in those of a style, so an object's gate is lower.
GATED: dict[Kind, SepMEConfig] = {"styles": _GATED, "objects": replace(_GATED, gate=0.42)}
# Without gates, as a LoRA: acts on every prompt in proportion to what it reads.
LINEAR: dict[Kind, SepMEConfig] = {
    "styles": SepMEConfig.linear(),
    "objects": SepMEConfig.linear(rank=1, soft_guard_weight=30.0, name_weight=0.0),
}


class Eraser:
    """Makes increments of the built-in model's styles and objects.

    Args:
        pipe: Its pipeline, with nothing erased while increments are made.
        objects: The objects that erasing one of them should leave alone.
        settings: With which settings, by kind.
    """

    def __init__(
        self, pipe: Any, objects: Sequence[str] = BANKED_OBJECTS, settings: Mapping[Kind, SepMEConfig] = GATED
    ) -> None:
        self.pipe, self.objects, self.settings = pipe, tuple(objects), settings
        self._soft: dict[Kind, SoftGuards] = {}

    def erase(
        self, kind: Kind, names: Sequence[str], bank: ConceptBank | None = None, others: Iterable[str] = ()
    ) -> ConceptBank:
        """Add an increment for each name to a bank. Each is guarded on all other names.

        Increments that the bank already holds are left as they are, so they do not guard the new names.

        Args:
            kind: What the names are of.
            names: Styles or objects.
            bank: Default: an empty one.
            others: More names to guard.
        """
        trainer = SepMETrainer(self.pipe, self.settings[kind], GUARDS, self._soft_guards(kind), tuple(others))
        return trainer.erase([self.concept(kind, name) for name in names], bank)

    def concept(self, kind: Kind, name: str) -> Concept:
        """Describe the style or object as a concept; its anchors are the same prompts with others of its kind."""
        if kind == "objects":
            return object_concept(name)
        # Not the plain prompt as anchor: its words stand at other places, so an object that comes late could get lost.
        return style_concept(name, [other for other in BANKED_STYLES if other != name])

    def seen(self, kind: Kind, names: Iterable[str]) -> set[str]:
        """Collect every prompt that making these increments reads, apart from guarded names."""
        concepts = [self.concept(kind, name) for name in names]
        own = {prompt for concept in concepts for pair in concept.pairs for prompt in pair}
        anchors = {prompt for concept in concepts for prompts in concept.anchors for prompt in prompts}
        return own | anchors | self._regular(kind)

    def _regular(self, kind: Kind) -> set[str]:
        """Choose the soft guards' prompts; the trainer passes over those that name the concept."""
        if kind == "styles":
            return {prompt for name in BANKED_STYLES for prompt in regular_for_styles(name)}
        return {prompt for name in self.objects for prompt in regular_prompts(name)}

    def _soft_guards(self, kind: Kind) -> SoftGuards:
        if kind not in self._soft:
            self._soft[kind] = SoftGuards.from_prompts(self.pipe, sorted(self._regular(kind)))
        return self._soft[kind]
