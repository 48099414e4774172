"""With which settings the evaluation erases: the one place that knows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from sepme_diffusers.bank import ConceptBank
from sepme_diffusers.closed_form import covariance
from sepme_diffusers.concepts import Concept, encode, rows
from sepme_diffusers.config import SepMEConfig
from sepme_diffusers.evaluation.probes import Kind
from sepme_diffusers.pocket.concepts import (
    BANKED_OBJECTS,
    GUARDS,
    object_concept,
    regular_for_styles,
    regular_prompts,
    style_concept,
)
from sepme_diffusers.training import SepMETrainer

_GATED = SepMEConfig(solver="closed_form", rank=1, soft_guard_weight=100.0, gain=1.0, gate=0.6, name_weight=0.0)
# Other wordings of an object read less of it than those of a style do, so its gate is lower.
GATED: dict[Kind, SepMEConfig] = {"styles": _GATED, "objects": replace(_GATED, gate=0.42)}
# What a LoRA could hold as well: it acts on every prompt in proportion.
LINEAR: dict[Kind, SepMEConfig] = {
    "styles": SepMEConfig(solver="closed_form"),
    "objects": SepMEConfig(solver="closed_form", rank=1, soft_guard_weight=30.0, name_weight=0.0),
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

    def erase(
        self, kind: Kind, names: Sequence[str], bank: ConceptBank | None = None, others: Iterable[str] = ()
    ) -> ConceptBank:
        """The bank with an increment for each name, guarded by the bank's, each other's and the other names.

        Increments that the bank holds are untouched, so they do not know these.

        Args:
            kind: What the names are of.
            names: Styles or objects.
            bank: Default: an empty one.
            others: More names to guard.
        """
        bank = bank if bank is not None else ConceptBank(SepMETrainer(self.pipe).base())
        known = (*bank, *names, *others)
        made = [self._one(kind, name, [other for other in known if other != name]) for name in names]
        return bank.with_entries(entry for one in made for entry in one.values())

    def concept(self, kind: Kind, name: str) -> Concept:
        """The style or object as a concept."""
        return style_concept(name) if kind == "styles" else object_concept(name)

    def seen(self, kind: Kind, names: Iterable[str]) -> set[str]:
        """Every prompt that making these increments reads, guarded names apart."""
        concepts = [self.concept(kind, name) for name in names]
        own = {prompt for one in concepts for pair in one.pairs for prompt in pair}
        own |= {prompt for one in concepts for prompts in one.anchors for prompt in prompts}
        if kind == "styles":
            return own | {prompt for one in concepts for prompt in regular_for_styles(one.name)}
        return own | {prompt for name in self.objects for prompt in regular_prompts(name)}

    def _one(self, kind: Kind, name: str, others: Sequence[str]) -> ConceptBank:
        soft = regular_for_styles(name) if kind == "styles" else self._other_objects(name)
        return SepMETrainer(self.pipe, self.settings[kind], GUARDS, soft, others).erase([self.concept(kind, name)])

    def _other_objects(self, name: str) -> Tensor:
        """The mean outer product of the tokens of the other objects' prompts, (d, d)."""
        others = [part for other, part in self._objects.items() if other != name]
        return sum(others) / len(others)

    @cached_property
    def _objects(self) -> dict[str, Tensor]:
        return {name: covariance(rows(encode(self.pipe, regular_prompts(name)))) for name in self.objects}
