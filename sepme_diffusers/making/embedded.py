"""EmbeddedConcept: a concept as embeddings, which is all that the closed form needs of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from sepme_diffusers.text.concept import Concept
from sepme_diffusers.text.encoding import TOKENS, Encoded, rows


@dataclass(frozen=True, eq=False)
class EmbeddedConcept:
    """A concept as embeddings at one door, the tokens', and at further doors.

    Args:
        concept: What is erased.
        own: Of the prompts that show it, in the order of `concept.prompts`, (n_prompts, n_tokens, d).
        anchors: What the closed form maps each of these to, (n_prompts, n_tokens, d).
        name: Of the name alone as a prompt, (n_tokens, d).
        counted: Which tokens of the prompts count, (n_prompts, n_tokens), see `Encoded.anchors`. Default: all.
        doors: The same at further doors, by door.

    Raises:
        ValueError: If the shapes do not fit.
    """

    concept: Concept
    own: Tensor
    anchors: Tensor
    name: Tensor
    counted: Tensor | None = None
    doors: Mapping[str, EmbeddedConcept] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.own.ndim != 3 or self.anchors.shape != self.own.shape or self.name.shape != self.own.shape[1:]:
            shapes = [tuple(tensor.shape) for tensor in (self.own, self.anchors, self.name)]
            raise ValueError(
                f"{self.concept.name!r} has prompts, anchors and a name of shapes {shapes}; they must be "
                "(n_prompts, n_tokens, d), the same, and (n_tokens, d)"
            )

    @classmethod
    def of(cls, concept: Concept, encoded: Encoded) -> EmbeddedConcept:
        """Encode a concept for every door of a pipeline."""
        encoded.prefetch([*concept.prompts, *(text for texts in concept.anchors for text in texts), concept.name])
        doors = {door: cls.at_door(concept, encoded.at(door)) for door in encoded.further_doors}
        return replace(cls.at_door(concept, encoded.at(TOKENS)), doors=doors)

    @classmethod
    def at_door(cls, concept: Concept, encoded: Encoded) -> EmbeddedConcept:
        """Encode a concept for one door of a pipeline, `encoded.door`."""
        anchors, counted = encoded.anchors(concept)
        return cls(concept, encoded(concept.prompts), anchors, encoded([concept.name])[0], counted)

    @property
    def rows(self) -> Tensor:
        """E, the token rows of its prompts that count, (n, d)."""
        return self._counted(self.own)

    @property
    def wanted_change(self) -> Tensor:
        """T, the change that is wanted of each of these rows, (n, d)."""
        return self._counted(self.anchors) - self.rows

    def _counted(self, embeddings: Tensor) -> Tensor:
        return rows(embeddings) if self.counted is None else embeddings[self.counted]

    def only(self, prompts: Sequence[int]) -> EmbeddedConcept:
        """Keep these of its prompts, by index."""
        kept = list(prompts)
        doors = {door: part.only(kept) for door, part in self.doors.items()}
        counted = None if self.counted is None else self.counted[kept]
        return replace(self, own=self.own[kept], anchors=self.anchors[kept], counted=counted, doors=doors)
